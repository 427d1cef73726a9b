// V and I on neon: four registers of four lanes. Included by simd.h inside namespace ELINVAR_ISA.

#define EL_EACH(expr)             \
    for (int i = 0; i < 4; ++i) { \
        r.v[i] = expr;            \
    }                             \
    return r

struct V {
    float32x4_t v[4];
};
struct I {
    int32x4_t v[4];
};
struct I2 {
    I low, high;
};
EL_INLINE V set1(float x) {
    V r;
    EL_EACH(vdupq_n_f32(x));
}
EL_INLINE V zero() { return set1(0.0f); }
EL_INLINE V load(const float* p) {
    V r;
    EL_EACH(vld1q_f32(p + 4 * i));
}
EL_INLINE void store(float* p, V a) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
}
EL_INLINE V load_n(const float* p, int n) {
    if (n == 16) return load(p);
    float t[16] = {};
    for (int i = 0; i < n; ++i) t[i] = p[i];
    return load(t);
}
EL_INLINE void store_n(float* p, V a, int n) {
    if (n == 16) return store(p, a);
    float t[16];
    store(t, a);
    for (int i = 0; i < n; ++i) p[i] = t[i];
}
EL_INLINE V load_half(const uint16_t* p) {
    V r;
    EL_EACH(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))));
}
EL_INLINE V load_bf16(const uint16_t* p) {
    V r;
    EL_EACH(vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)));
}
EL_INLINE V load_int8(const int8_t* p) {
    const int8x16_t codes = vld1q_s8(p);
    const int16x8_t low = vmovl_s8(vget_low_s8(codes)), high = vmovl_s8(vget_high_s8(codes));
    return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
             vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
             vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
             vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
}
EL_INLINE void store_half(uint16_t* p, V a) {
    for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
}
EL_INLINE V operator+(V a, V b) {
    V r;
    EL_EACH(vaddq_f32(a.v[i], b.v[i]));
}
EL_INLINE V operator-(V a, V b) {
    V r;
    EL_EACH(vsubq_f32(a.v[i], b.v[i]));
}
EL_INLINE V operator*(V a, V b) {
    V r;
    EL_EACH(vmulq_f32(a.v[i], b.v[i]));
}
EL_INLINE V operator/(V a, V b) {
    V r;
    EL_EACH(vdivq_f32(a.v[i], b.v[i]));
}
EL_INLINE V fma(V a, V b, V c) {
    V r;
    EL_EACH(vfmaq_f32(c.v[i], a.v[i], b.v[i]));
}
EL_INLINE V max(V a, V b) {  // a > b ? a : b, as on x86
    V r;
    EL_EACH(vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]));
}
EL_INLINE V min(V a, V b) {
    V r;
    EL_EACH(vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]));
}
EL_INLINE V abs(V a) {
    V r;
    EL_EACH(vabsq_f32(a.v[i]));
}
EL_INLINE V select_lt(V a, V b, V yes, V no) {
    V r;
    EL_EACH(vbslq_f32(vcltq_f32(a.v[i], b.v[i]), yes.v[i], no.v[i]));
}
EL_INLINE I round_to_int(V a) {
    I r;
    EL_EACH(vcvtnq_s32_f32(a.v[i]));
}
EL_INLINE V to_float(I a) {
    V r;
    EL_EACH(vcvtq_f32_s32(a.v[i]));
}
EL_INLINE I int_set1(int32_t x) {
    I r;
    EL_EACH(vdupq_n_s32(x));
}
EL_INLINE void store_bytes(int8_t* p, I a) {  // lanes within -128 .. 127
    const int16x8_t low = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
    const int16x8_t high = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
    vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}
EL_INLINE I operator+(I a, I b) {
    I r;
    EL_EACH(vaddq_s32(a.v[i], b.v[i]));
}
EL_INLINE I operator-(I a, I b) {
    I r;
    EL_EACH(vsubq_s32(a.v[i], b.v[i]));
}
EL_INLINE I operator&(I a, I b) {
    I r;
    EL_EACH(vandq_s32(a.v[i], b.v[i]));
}
EL_INLINE I operator^(I a, I b) {
    I r;
    EL_EACH(veorq_s32(a.v[i], b.v[i]));
}
EL_INLINE I2 wide_product(I a, uint32_t b) {
    I2 r;
    for (int i = 0; i < 4; ++i) {
        const uint32x4_t x = vreinterpretq_u32_s32(a.v[i]);
        const uint32x4_t first = vreinterpretq_u32_u64(vmull_n_u32(vget_low_u32(x), b));
        const uint32x4_t last = vreinterpretq_u32_u64(vmull_n_u32(vget_high_u32(x), b));
        r.low.v[i] = vreinterpretq_s32_u32(vuzp1q_u32(first, last));
        r.high.v[i] = vreinterpretq_s32_u32(vuzp2q_u32(first, last));
    }
    return r;
}
template <int N>
EL_INLINE I shift_left(I a) {
    I r;
    EL_EACH(vshlq_n_s32(a.v[i], N));
}
template <int N>
EL_INLINE I shift_right_signed(I a) {
    I r;
    EL_EACH(vshrq_n_s32(a.v[i], N));
}
EL_INLINE V as_float(I a) {
    V r;
    EL_EACH(vreinterpretq_f32_s32(a.v[i]));
}
EL_INLINE I as_int(V a) {
    I r;
    EL_EACH(vreinterpretq_s32_f32(a.v[i]));
}
#undef EL_EACH
