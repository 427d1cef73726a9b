// How a product of matrices is cut into work items: blocks of rows times chunks of panels.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace elinvar {

// Blocks of rows small enough for their activations to stay in the L2 cache, times chunks of
// panels, few as each begins cold, fine enough to balance threads. The kernel of float weights
// keeps panels in L2 and takes its rows from L3: it wants larger blocks, and its panels in pairs.
struct Tiling {
    int row_block, row_blocks, chunk, chunks;

    // Items that balance `threads` threads.
    static int wanted(int rows, bool quantised, int threads) {
        const int a_thread = rows <= (quantised ? 4 : 32) ? 2 : quantised ? 3 : 6;
        return threads == 1 ? 1 : threads * a_thread;
    }

    Tiling(int rows, int k, int panels, bool quantised, int items) {
        const int row_bytes = quantised ? k / 32 * int{sizeof(QuantGroup)} : 4 * k;
        const int most = std::max(8, (quantised ? 256 : 1024) * 1024 / row_bytes);
        row_blocks = (rows + most - 1) / most;
        row_block = ((rows + row_blocks - 1) / row_blocks + 7) / 8 * 8;  // a tile begins there
        row_blocks = (rows + row_block - 1) / row_block;
        const int columns = (items + row_blocks - 1) / row_blocks;
        chunk = (panels + columns - 1) / columns;
        if (!quantised) chunk = (chunk + 1) / 2 * 2;
        chunks = (panels + chunk - 1) / chunk;
    }
    int count() const { return row_blocks * chunks; }
};

}  // namespace elinvar
