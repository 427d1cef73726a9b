// V and I on scalar: the same arithmetic, one lane after the other. Included by simd.h inside
// namespace ELINVAR_ISA.

#define EL_EACH(expr)                  \
    for (int i = 0; i < kLanes; ++i) { \
        r.v[i] = expr;                 \
    }                                  \
    return r

struct V {
    float v[16];
};
struct I {
    int32_t v[16];
};
struct I2 {
    I low, high;
};
EL_INLINE V set1(float x) {
    V r;
    EL_EACH(x);
}
EL_INLINE V zero() { return set1(0.0f); }
EL_INLINE V load(const float* p) {
    V r;
    EL_EACH(p[i]);
}
EL_INLINE void store(float* p, V a) { std::memcpy(p, a.v, sizeof(a.v)); }
EL_INLINE V load_n(const float* p, int n) {
    V r;
    EL_EACH(i < n ? p[i] : 0.0f);
}
EL_INLINE void store_n(float* p, V a, int n) {
    for (int i = 0; i < n; ++i) p[i] = a.v[i];
}
EL_INLINE V load_half(const uint16_t* p) {
    V r;
    EL_EACH(half_to_float(p[i]));
}
EL_INLINE V load_bf16(const uint16_t* p) {
    V r;
    EL_EACH(bf16_to_float(p[i]));
}
EL_INLINE V load_int8(const int8_t* p) {
    V r;
    EL_EACH(static_cast<float>(p[i]));
}
EL_INLINE void store_half(uint16_t* p, V a) {
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(a.v[i]);
}
EL_INLINE V operator+(V a, V b) {
    V r;
    EL_EACH(a.v[i] + b.v[i]);
}
EL_INLINE V operator-(V a, V b) {
    V r;
    EL_EACH(a.v[i] - b.v[i]);
}
EL_INLINE V operator*(V a, V b) {
    V r;
    EL_EACH(a.v[i] * b.v[i]);
}
EL_INLINE V operator/(V a, V b) {
    V r;
    EL_EACH(a.v[i] / b.v[i]);
}
EL_INLINE V fma(V a, V b, V c) {
    V r;
    EL_EACH(fmadd(a.v[i], b.v[i], c.v[i]));
}
EL_INLINE V max(V a, V b) {
    V r;
    EL_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]);
}
EL_INLINE V min(V a, V b) {
    V r;
    EL_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]);
}
EL_INLINE V abs(V a) {
    V r;
    EL_EACH(bits_to_float(float_to_bits(a.v[i]) & 0x7fffffff));
}
EL_INLINE V select_lt(V a, V b, V yes, V no) {
    V r;
    EL_EACH(a.v[i] < b.v[i] ? yes.v[i] : no.v[i]);
}
EL_INLINE I round_to_int(V a) {
    I r;
    EL_EACH(static_cast<int32_t>(__builtin_rintf(a.v[i])));
}
EL_INLINE V to_float(I a) {
    V r;
    EL_EACH(static_cast<float>(a.v[i]));
}
EL_INLINE I int_set1(int32_t x) {
    I r;
    EL_EACH(x);
}
EL_INLINE void store_bytes(int8_t* p, I a) {  // lanes within -128 .. 127
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}
EL_INLINE I operator+(I a, I b) {
    I r;
    EL_EACH(static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i])));
}
EL_INLINE I operator-(I a, I b) {
    I r;
    EL_EACH(static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) - static_cast<uint32_t>(b.v[i])));
}
EL_INLINE I operator&(I a, I b) {
    I r;
    EL_EACH(a.v[i] & b.v[i]);
}
EL_INLINE I operator^(I a, I b) {
    I r;
    EL_EACH(a.v[i] ^ b.v[i]);
}
EL_INLINE I2 wide_product(I a, uint32_t b) {
    I2 r;
    for (int i = 0; i < kLanes; ++i) {
        const uint64_t product = uint64_t{static_cast<uint32_t>(a.v[i])} * b;
        r.low.v[i] = static_cast<int32_t>(static_cast<uint32_t>(product));
        r.high.v[i] = static_cast<int32_t>(product >> 32);
    }
    return r;
}
template <int N>
EL_INLINE I shift_left(I a) {
    I r;
    EL_EACH(static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << N));
}
template <int N>
EL_INLINE I shift_right_signed(I a) {
    I r;
    EL_EACH(a.v[i] >> N);
}
EL_INLINE V as_float(I a) {
    V r;
    EL_EACH(bits_to_float(static_cast<uint32_t>(a.v[i])));
}
EL_INLINE I as_int(V a) {
    I r;
    EL_EACH(static_cast<int32_t>(float_to_bits(a.v[i])));
}
#undef EL_EACH
