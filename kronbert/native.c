/* What lies between two matrix products, in one pass over memory: the CPU engine's row kernels.
 *
 * kronbert/native.py builds this file on the machine that runs it and says what each function
 * computes. Tensors are contiguous; bf16 = 0 holds float32, 1 bfloat16, computed in float32 and
 * rounded to nearest even. Widths are multiples of 16. OpenMP shares the rows among threads.
 * The vector type is the compiler's own, one register of the machine: gcc keeps what is wider in
 * memory, so that every operation waits for a store. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(LANES)
#elif defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));

INLINE vec all(float x) { return (vec){0} + x; }

INLINE vec load(const void *p, int64_t i, int bf16) {
  if (bf16) {
    hvec half;
    memcpy(&half, (const uint16_t *)p + i, sizeof half);
    return (vec)(__builtin_convertvector(half, uvec) << 16);
  }
  vec v;
  memcpy(&v, (const float *)p + i, sizeof v);
  return v;
}

INLINE void store(void *p, int64_t i, vec v, int bf16) {
  if (!bf16) {
    memcpy((float *)p + i, &v, sizeof v);
    return;
  }
  uvec bits = (uvec)v, nan = (uvec)(v != v);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  hvec half = __builtin_convertvector((bits & ~nan) | (0x7fc0 & nan), hvec);
  memcpy((uint16_t *)p + i, &half, sizeof half);
}

INLINE vec pick(ivec where, vec a, vec b) { return (vec)(((ivec)a & where) | ((ivec)b & ~where)); }

INLINE float sum(vec v) {
  float s = 0;
  for (int i = 0; i < LANES; i++) s += v[i];
  return s;
}

INLINE float largest(vec v) {
  float top = v[0];
  for (int i = 1; i < LANES; i++) top = v[i] > top ? v[i] : top;
  return top;
}

/* erf(x / sqrt 2): x times a rational minimax fit in x^2, at most 2.2e-8 off on [-4, 4], and +-1 to
 * float32 beyond. */
INLINE vec erf_of(vec x) {
  vec t = x * 0.70710678f, s = t * t;
  vec p = all(1.974815060e-06f) * s + 2.880411073e-04f;
  p = p * s + 4.003668942e-03f;
  p = p * s + 5.346755099e-02f;
  p = p * s + 1.962496446e-01f;
  p = p * s + 1.128378976f;
  vec q = all(3.748068779e-05f) * s + 1.216363841e-03f;
  q = q * s + 1.544447025e-02f;
  q = q * s + 1.164766882e-01f;
  q = q * s + 5.072528780e-01f;
  q = q * s + 1.0f;
  vec erf = t * p / q;
  erf = pick(t < -4, all(-1), erf);
  return pick(t > 4, all(1), erf);
}

INLINE vec gelu(vec x) {
  vec half = 0.5f * x;
  return half + half * erf_of(x);
}

/* exp(x) for x <= 0; 0 below -87. x = n log 2 + r, a polynomial in r (5e-9 off), n in the exponent.
 */
INLINE vec exp_of(vec x) {
  vec n = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the sum rounds to a whole number */
  ivec exponent = (ivec)n << 23;
  n -= 12582912.0f;
  vec r = x - n * 0.693145752f - n * 1.42860677e-6f;
  vec p = all(1.3888889e-3f) * r + 8.3333333e-3f;
  p = p * r + 4.1666668e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return pick(x < -87.0f, all(0), (vec)((ivec)p + exponent));
}

/* mix: y (n, p, w) = matrix (p, q) . z (n, q, w) + bias (p, w) */
INLINE void mix_rows(const void *z, const float *matrix, const void *bias, void *y, int64_t from,
    int64_t to, int p, int q, int w, int bf16) {
  for (int64_t t = from; t < to; t++)
    for (int c = 0; c < w; c += LANES) {
      vec in[16];
#pragma GCC unroll 16
      for (int j = 0; j < q; j++) in[j] = load(z, (t * q + j) * w + c, bf16);
      for (int i = 0; i < p; i++) {
        vec out = bias ? load(bias, (int64_t)i * w + c, bf16) : all(0);
#pragma GCC unroll 16
        for (int j = 0; j < q; j++) out += in[j] * matrix[i * q + j];
        store(y, (t * p + i) * w + c, out, bf16);
      }
    }
}

#define MIX(Q) \
  if (q == Q) { \
    if (bf16) mix_rows(z, matrix, bias, y, from, to, p, Q, w, 1); \
    else mix_rows(z, matrix, bias, y, from, to, p, Q, w, 0); \
    continue; \
  }

void kronbert_mix(const void *z, const float *matrix, const void *bias, void *y, int64_t n, int p,
    int q, int w, int bf16, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int part = 0; part < threads; part++) {
    int64_t from = n * part / threads, to = n * (part + 1) / threads;
    MIX(1) MIX(2) MIX(4) MIX(8) MIX(16)
    if (bf16) mix_rows(z, matrix, bias, y, from, to, p, q, w, 1);
    else mix_rows(z, matrix, bias, y, from, to, p, q, w, 0);
  }
}

/* gather: z (n, m, rows) = b (m, inner) . x (n, rows, inner) turned: what a small matrix makes of
 * every row of inner numbers, slice by slice. spread: y (n, rows, m) = z (n, m, rows) turned + bias.
 * inner and m are 2, 4, 8 or 16, rows a multiple of 16. */
#define PICK(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})

#if LANES == 16
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif LANES == 8
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define EVEN 0, 2, 4, 6
#define ODD 1, 3, 5, 7
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#endif

INLINE vec even(vec a, vec b) { return PICK(a, b, EVEN); }
INLINE vec odd(vec a, vec b) { return PICK(a, b, ODD); }
INLINE vec low(vec a, vec b) { return PICK(a, b, LOW); }
INLINE vec high(vec a, vec b) { return PICK(a, b, HIGH); }

/* v: LANES rows of k numbers, as they lie, to k columns of LANES numbers */
INLINE void part(vec *v, int k) {
#pragma GCC unroll 4
  for (int size = k; size > 1; size /= 2)
#pragma GCC unroll 8
    for (int start = 0; start < k; start += size) {
      vec t[16];
#pragma GCC unroll 8
      for (int i = 0; i < size / 2; i++) {
        t[i] = even(v[start + 2 * i], v[start + 2 * i + 1]);
        t[size / 2 + i] = odd(v[start + 2 * i], v[start + 2 * i + 1]);
      }
#pragma GCC unroll 16
      for (int i = 0; i < size; i++) v[start + i] = t[i];
    }
}

/* its inverse */
INLINE void join(vec *v, int k) {
#pragma GCC unroll 4
  for (int size = 2; size <= k; size *= 2)
#pragma GCC unroll 8
    for (int start = 0; start < k; start += size) {
      vec t[16];
#pragma GCC unroll 8
      for (int i = 0; i < size / 2; i++) {
        t[2 * i] = low(v[start + i], v[start + size / 2 + i]);
        t[2 * i + 1] = high(v[start + i], v[start + size / 2 + i]);
      }
#pragma GCC unroll 16
      for (int i = 0; i < size; i++) v[start + i] = t[i];
    }
}

/* where `part` puts column i of k: its bits reversed */
INLINE int place(int i, int k) {
  int at = 0;
  for (int bit = 1; bit < k; bit *= 2) at = at * 2 + !!(i & bit);
  return at;
}

INLINE void gather_rows(const void *x, const float *b, void *z, int64_t from, int64_t to, int rows,
    int inner, int m, int bf16) {
  for (int64_t t = from; t < to; t++)
    for (int r = 0; r < rows; r += LANES) {
      vec v[16];
#pragma GCC unroll 16
      for (int i = 0; i < inner; i++)
        v[i] = load(x, (t * rows + r) * inner + i * LANES, bf16);
      part(v, inner);
      for (int j = 0; j < m; j++) {
        vec out = all(0);
#pragma GCC unroll 16
        for (int i = 0; i < inner; i++) out += v[place(i, inner)] * b[j * inner + i];
        store(z, (t * m + j) * rows + r, out, bf16);
      }
    }
}

INLINE void spread_rows(const void *z, const void *bias, void *y, int64_t from, int64_t to,
    int rows, int m, int bf16) {
  for (int64_t t = from; t < to; t++)
    for (int r = 0; r < rows; r += LANES) {
      vec v[16];
#pragma GCC unroll 16
      for (int j = 0; j < m; j++) v[place(j, m)] = load(z, (t * m + j) * rows + r, bf16);
      join(v, m);
#pragma GCC unroll 16
      for (int j = 0; j < m; j++) {
        vec out = v[j];
        if (bias) out += load(bias, r * m + j * LANES, bf16);
        store(y, (t * rows + r) * m + j * LANES, out, bf16);
      }
    }
}

#define GATHER(K) \
  if (inner == K) { \
    if (bf16) gather_rows(x, b, z, from, to, rows, K, m, 1); \
    else gather_rows(x, b, z, from, to, rows, K, m, 0); \
  }

void kronbert_gather(const void *x, const float *b, void *z, int64_t n, int rows, int inner, int m,
    int bf16, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int part = 0; part < threads; part++) {
    int64_t from = n * part / threads, to = n * (part + 1) / threads;
    GATHER(2) GATHER(4) GATHER(8) GATHER(16)
  }
}

#define SPREAD(M) \
  if (m == M) { \
    if (bf16) spread_rows(z, bias, y, from, to, rows, M, 1); \
    else spread_rows(z, bias, y, from, to, rows, M, 0); \
  }

void kronbert_spread(const void *z, const void *bias, void *y, int64_t n, int rows, int m, int bf16,
    int threads) {
#pragma omp parallel for num_threads(threads)
  for (int part = 0; part < threads; part++) {
    int64_t from = n * part / threads, to = n * (part + 1) / threads;
    SPREAD(2) SPREAD(4) SPREAD(8) SPREAD(16)
  }
}

/* ffn_middle: y (n, m, w) = down (m, wide) . gelu(up (wide, k) . z (n, k, w) + bias (wide, w)) */
INLINE void middle_rows(const void *z, const float *up, const void *bias, const float *down,
    void *y, int64_t from, int64_t to, int k, int wide, int m, int w, int bf16) {
  for (int64_t t = from; t < to; t++)
    for (int c = 0; c < w; c += LANES) {
      vec in[8], out[8];
#pragma GCC unroll 8
      for (int j = 0; j < k; j++) in[j] = load(z, (t * k + j) * w + c, bf16);
#pragma GCC unroll 8
      for (int j = 0; j < m; j++) out[j] = all(0);
      for (int i = 0; i < wide; i++) {
        vec h = bias ? load(bias, (int64_t)i * w + c, bf16) : all(0);
#pragma GCC unroll 8
        for (int j = 0; j < k; j++) h += in[j] * up[i * k + j];
        h = gelu(h);
#pragma GCC unroll 8
        for (int j = 0; j < m; j++) out[j] += h * down[j * wide + i];
      }
#pragma GCC unroll 8
      for (int j = 0; j < m; j++) store(y, (t * m + j) * w + c, out[j], bf16);
    }
}

#define MIDDLE(K, M) \
  if (k == K && m == M) { \
    if (bf16) middle_rows(z, up, bias, down, y, from, to, K, wide, M, w, 1); \
    else middle_rows(z, up, bias, down, y, from, to, K, wide, M, w, 0); \
    continue; \
  }

void kronbert_ffn_middle(const void *z, const float *up, const void *bias, const float *down,
    void *y, int64_t n, int k, int wide, int m, int w, int bf16, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int part = 0; part < threads; part++) {
    int64_t from = n * part / threads, to = n * (part + 1) / threads;
    MIDDLE(1, 1) MIDDLE(2, 2) MIDDLE(4, 4) MIDDLE(8, 8)
    if (bf16) middle_rows(z, up, bias, down, y, from, to, k, wide, m, w, 1);
    else middle_rows(z, up, bias, down, y, from, to, k, wide, m, w, 0);
  }
}

/* bias_gelu: x (n, w) = gelu(x + bias), in place */
INLINE void bias_gelu_rows(
    void *x, const void *bias, int64_t from, int64_t to, int w, int bf16) {
  for (int64_t t = from; t < to; t++)
    for (int c = 0; c < w; c += LANES) {
      vec h = load(x, t * w + c, bf16);
      if (bias) h += load(bias, c, bf16);
      store(x, t * w + c, gelu(h), bf16);
    }
}

void kronbert_bias_gelu(void *x, const void *bias, int64_t n, int w, int bf16, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int part = 0; part < threads; part++) {
    int64_t from = n * part / threads, to = n * (part + 1) / threads;
    if (bf16) bias_gelu_rows(x, bias, from, to, w, 1);
    else bias_gelu_rows(x, bias, from, to, w, 0);
  }
}

/* gelu_slope: x = gelu(x) and slope = slope gelu'(x), both (n, w), in place, in float32 */
void kronbert_gelu_slope(float *x, float *slope, int64_t n, int w, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int part = 0; part < threads; part++)
    for (int64_t i = n * part / threads * w; i < n * (part + 1) / threads * w; i += LANES) {
      vec h = load(x, i, 0), half = 0.5f + 0.5f * erf_of(h);
      vec own = half + 0.39894228f * h * exp_of(-0.5f * h * h);
      store(slope, i, load(slope, i, 0) * own, 0);
      store(x, i, h * half, 0);
    }
}

/* add_norm: y (n, w) = LN(x + bias + residual) * weight + shift */
INLINE void norm_rows(const void *x, const void *bias, const void *residual, const void *weight,
    const void *shift, float eps, void *y, int64_t from, int64_t to, int w, int bf16) {
  float row[w];
  for (int64_t t = from; t < to; t++) {
    vec total = all(0), squares = all(0);
    for (int c = 0; c < w; c += LANES) {
      vec v = load(x, t * w + c, bf16);
      if (bias) v += load(bias, c, bf16);
      if (residual) v += load(residual, t * w + c, bf16);
      total += v;
      store(row, c, v, 0);
    }
    float mean = sum(total) / w;
    for (int c = 0; c < w; c += LANES) {
      vec v = load(row, c, 0) - mean;
      squares += v * v;
    }
    float scale = 1 / sqrtf(sum(squares) / w + eps);
    for (int c = 0; c < w; c += LANES) {
      vec v = (load(row, c, 0) - mean) * scale * load(weight, c, bf16);
      if (shift) v += load(shift, c, bf16);
      store(y, t * w + c, v, bf16);
    }
  }
}

void kronbert_add_norm(const void *x, const void *bias, const void *residual, const void *weight,
    const void *shift, float eps, void *y, int64_t n, int w, int bf16, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int part = 0; part < threads; part++) {
    int64_t from = n * part / threads, to = n * (part + 1) / threads;
    if (bf16) norm_rows(x, bias, residual, weight, shift, eps, y, from, to, w, 1);
    else norm_rows(x, bias, residual, weight, shift, eps, y, from, to, w, 0);
  }
}
