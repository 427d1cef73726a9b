// Buffers of results, kept by size class when given back: a large step would otherwise fault its
// pages in anew.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

namespace elinvar {

class Arena {
  public:
    Arena() = default;
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    ~Arena() {
        for (Buffer* b : free_)
            while (b) {
                Buffer* next = b->next;
                b->~Buffer();
                std::free(b);
                b = next;
            }
    }

    // The arena of all results that are not part of a recording.
    static const std::shared_ptr<Arena>& common() {
        static auto* arena = new std::shared_ptr<Arena>(std::make_shared<Arena>());
        return *arena;  // outlives every array
    }

    static void* take(const std::shared_ptr<Arena>& from, std::size_t bytes) {
        std::size_t c = 8;
        while ((std::size_t{1} << c) < bytes) ++c;
        Buffer* b = from->pop(c);
        if (!b) {
            void* raw = std::aligned_alloc(64, kHeader + (std::size_t{1} << c));
            if (!raw) throw std::bad_alloc();
            b = new (raw) Buffer{c, nullptr, nullptr};
        }
        b->owner = from;
        return reinterpret_cast<char*>(b) + kHeader;
    }

    static void give(void* p) noexcept {
        auto* b = reinterpret_cast<Buffer*>(static_cast<char*>(p) - kHeader);
        const std::shared_ptr<Arena> owner = std::move(b->owner);
        const std::lock_guard<std::mutex> lock(owner->mutex_);
        b->next = owner->free_[b->size_class];
        owner->free_[b->size_class] = b;
    }

  private:
    struct Buffer {
        std::size_t size_class;
        Buffer* next;
        std::shared_ptr<Arena> owner;  // while it is out: an array may outlive its provider
    };
    static constexpr std::size_t kHeader = 64;
    static_assert(sizeof(Buffer) <= kHeader);

    Buffer* pop(std::size_t c) {
        const std::lock_guard<std::mutex> lock(mutex_);
        Buffer* b = free_[c];
        if (b) free_[c] = b->next;
        return b;
    }

    std::mutex mutex_;
    Buffer* free_[64] = {};
};

}  // namespace elinvar
