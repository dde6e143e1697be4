/* Attention of whole sequences: softmax(scale q kᵀ + mask) v, heads side by side, in float32 inside.
 *
 * One thread takes one head of one sequence: keys transposed and values copied to lie densely, then
 * six queries at a time, whose scores never leave the first cache. */

#include "native.c"

#define ROWS 6
#define WIDE (LANES == 8 ? 2 : 4) /* ROWS * WIDE sums and a line of WIDE fit into the registers */
#define STEP 16 /* keys are padded to a multiple of it, whatever LANES is */

/* c (ROWS, LANES * wide) = a (ROWS, k) . b (k, LANES * wide) */
INLINE void tile(const float *a, int64_t a_stride, const float *b, int64_t b_stride, float *c,
    int64_t c_stride, int k, int wide) {
  vec acc[ROWS][4], line[4];
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
    for (int j = 0; j < wide; j++) acc[i][j] = all(0);
  for (int p = 0; p < k; p++) {
#pragma GCC unroll 4
    for (int j = 0; j < wide; j++) line[j] = load(b, p * b_stride + j * LANES, 0);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
      for (int j = 0; j < wide; j++) acc[i][j] += line[j] * a[i * a_stride + p];
  }
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
    for (int j = 0; j < wide; j++) store(c, i * c_stride + j * LANES, acc[i][j], 0);
}

/* c (ROWS, columns) = a (ROWS, k) . b (k, columns), columns a multiple of 16 */
static void product(const float *a, int64_t a_stride, const float *b, int64_t b_stride, float *c,
    int64_t c_stride, int k, int columns) {
  int j = 0;
  for (; j + WIDE * LANES <= columns; j += WIDE * LANES)
    tile(a, a_stride, b + j, b_stride, c + j, c_stride, k, WIDE);
  int rest = (columns - j) / LANES; /* only where WIDE * LANES is more than 16 */
  if (rest == 3) tile(a, a_stride, b + j, b_stride, c + j, c_stride, k, 3);
  if (rest == 2) tile(a, a_stride, b + j, b_stride, c + j, c_stride, k, 2);
  if (rest == 1) tile(a, a_stride, b + j, b_stride, c + j, c_stride, k, 1);
}

/* One head: target (d, padded) = the rows of x (tokens, d), turned */
INLINE void turned(const void *x, const void *bias, int64_t at, int64_t column, int64_t stride,
    float *target, int tokens, int padded, int d, int bf16) {
  for (int i = 0; i < padded; i += LANES)
    for (int j = 0; j < d; j += LANES) {
      vec rows[LANES];
      vec added = bias ? load(bias, column + j, bf16) : all(0);
      for (int r = 0; r < LANES; r++)
        rows[r] = i + r < tokens ? load(x, at + (i + r) * stride + j, bf16) + added : all(0);
      part(rows, LANES);
      for (int r = 0; r < LANES; r++)
        store(target, (int64_t)(j + r) * padded + i, rows[place(r, LANES)], 0);
    }
}

/* One head: target (tokens, d) = the rows of x */
INLINE void copied(const void *x, const void *bias, int64_t at, int64_t column, int64_t stride,
    float *target, int tokens, int d, int bf16) {
  for (int i = 0; i < tokens; i++)
    for (int j = 0; j < d; j += LANES) {
      vec line = load(x, at + i * stride + j, bf16);
      if (bias) line += load(bias, column + j, bf16);
      store(target, (int64_t)i * d + j, line, 0);
    }
}

/* scores (padded) of one query to exp(scores + mask - their largest); 1 / their sum, 0 where every
 * key is masked */
INLINE float softmax(float *scores, const float *mask, int tokens, int padded) {
  for (int j = tokens; j < padded; j++) scores[j] = -INFINITY;
  vec top = all(-INFINITY), total = all(0);
  for (int j = 0; j < padded; j += LANES) {
    vec line = load(scores, j, 0);
    if (mask) line += load(mask, j, 0);
    store(scores, j, line, 0);
    top = pick(line > top, line, top);
  }
  float most = largest(top);
  if (most == -INFINITY) {
    for (int j = 0; j < tokens; j++)
      if (scores[j] != scores[j]) return scores[j]; /* NaN is larger than nothing */
    memset(scores, 0, sizeof(float) * padded);
    return 0;
  }
  for (int j = 0; j < padded; j += LANES) {
    vec line = exp_of(load(scores, j, 0) - most);
    total += line;
    store(scores, j, line, 0);
  }
  return 1 / sum(total);
}

INLINE int attend(const void *q, const void *k, const void *v, const void *q_bias,
    const void *k_bias, const void *v_bias, const float *mask, void *y, int64_t batch, int heads,
    int tokens, int d, int queries, float scale, int bf16, int threads) {
  int64_t width = (int64_t)heads * d;
  int padded = (tokens + STEP - 1) / STEP * STEP, failed = 0;
#pragma omp parallel num_threads(threads)
  {
    int64_t numbers = (int64_t)padded * (2 * d + ROWS) + 2 * ROWS * d;
    float *keys = aligned_alloc(64, sizeof(float) * ((numbers + STEP - 1) / STEP * STEP));
    float *values = keys + (int64_t)d * padded, *scores = values + (int64_t)d * padded;
    float *scaled = scores + (int64_t)ROWS * padded, *out = scaled + ROWS * d;
    if (!keys) {
#pragma omp atomic write
      failed = 1;
    } else {
      memset(scaled, 0, sizeof(float) * ROWS * d);
    }
#pragma omp for schedule(static)
    for (int64_t job = 0; job < batch * heads; job++) {
      if (!keys) continue;
      int64_t sequence = job / heads, column = job % heads * d;
      int64_t at = sequence * tokens * width + column;
      turned(k, k_bias, at, column, width, keys, tokens, padded, d, bf16);
      copied(v, v_bias, at, column, width, values, tokens, d, bf16);
      for (int i = 0; i < tokens; i += ROWS) {
        int rows = tokens - i < ROWS ? tokens - i : ROWS;
        float inverse[ROWS];
        for (int r = 0; r < rows; r++)
          for (int j = 0; j < d; j += LANES) {
            vec line = load(q, at + (i + r) * width + j, bf16);
            if (q_bias) line += load(q_bias, column + j, bf16);
            store(scaled, r * d + j, line * scale, 0);
          }
        product(scaled, d, keys, padded, scores, padded, d, padded);
        for (int r = 0; r < rows; r++) {
          const float *hidden = mask;
          if (mask) hidden += (sequence * queries + (queries > 1 ? i + r : 0)) * padded;
          inverse[r] = softmax(scores + (int64_t)r * padded, hidden, tokens, padded);
        }
        product(scores, padded, values, d, out, d, tokens, d);
        for (int r = 0; r < rows; r++)
          for (int j = 0; j < d; j += LANES)
            store(y, at + (i + r) * width + j, load(out, r * d + j, 0) * inverse[r], bf16);
      }
    }
    free(keys);
  }
  return failed;
}

/* q, k, v, y (batch, tokens, heads * d); biases (heads * d) or NULL; mask NULL or float32
 * (batch, queries, padded), queries 1 or tokens, padded = tokens to the next multiple of 16.
 * Returns 1 if memory ran out. */
int kronbert_attention(const void *q, const void *k, const void *v, const void *q_bias,
    const void *k_bias, const void *v_bias, const float *mask, void *y, int64_t batch, int heads,
    int tokens, int d, int queries, float scale, int bf16, int threads) {
  if (bf16)
    return attend(q, k, v, q_bias, k_bias, v_bias, mask, y, batch, heads, tokens, d, queries, scale,
        1, threads);
  return attend(q, k, v, q_bias, k_bias, v_bias, mask, y, batch, heads, tokens, d, queries, scale, 0,
      threads);
}

/* target (tokens, d) += aᵀ (tokens, ROWS) . b (ROWS, d) */
INLINE void add_outer(const float *a, int64_t a_stride, const float *b, float *target,
    int64_t stride, int tokens, int d) {
  for (int j = 0; j < d; j += LANES) {
    vec lines[ROWS];
    for (int r = 0; r < ROWS; r++) lines[r] = load(b, r * d + j, 0);
    for (int i = 0; i < tokens; i++) {
      vec line = load(target, i * stride + j, 0);
      for (int r = 0; r < ROWS; r++) line += lines[r] * a[r * a_stride + i];
      store(target, i * stride + j, line, 0);
    }
  }
}

/* Gradients of kronbert_attention without biases, in float32: dq, dk, dv from dy, all (batch,
 * tokens, heads * d). With P the softmax, dP = dy vᵀ and dS = P (dP - the sum of P dP over keys),
 * dq = scale dS k, dk = scale dSᵀ q and dv = Pᵀ dy; P is made anew, six queries at a time.
 * Returns 1 if memory ran out. */
int kronbert_attention_backward(const float *q, const float *k, const float *v, const float *mask,
    const float *dy, float *dq, float *dk, float *dv, int64_t batch, int heads, int tokens, int d,
    int queries, float scale, int threads) {
  int64_t width = (int64_t)heads * d;
  int padded = (tokens + STEP - 1) / STEP * STEP, failed = 0;
#pragma omp parallel num_threads(threads)
  {
    int64_t numbers = (int64_t)padded * 2 * (d + ROWS) + 3 * ROWS * d;
    float *keys = aligned_alloc(64, sizeof(float) * ((numbers + STEP - 1) / STEP * STEP));
    float *values = keys + (int64_t)d * padded, *scores = values + (int64_t)d * padded;
    float *slopes = scores + (int64_t)ROWS * padded, *scaled = slopes + (int64_t)ROWS * padded;
    float *given = scaled + ROWS * d, *out = given + ROWS * d;
    if (!keys) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(static)
    for (int64_t job = 0; job < batch * heads; job++) {
      if (!keys) continue;
      int64_t sequence = job / heads, at = sequence * tokens * width + job % heads * d;
      turned(k, NULL, at, 0, width, keys, tokens, padded, d, 0);
      turned(v, NULL, at, 0, width, values, tokens, padded, d, 0);
      for (int i = 0; i < tokens; i++) {
        memset(dk + at + i * width, 0, sizeof(float) * d);
        memset(dv + at + i * width, 0, sizeof(float) * d);
      }
      for (int i = 0; i < tokens; i += ROWS) {
        int rows = tokens - i < ROWS ? tokens - i : ROWS;
        for (int r = 0; r < ROWS; r++)
          for (int j = 0; j < d; j += LANES) {
            int64_t from = at + (i + r) * width + j;
            store(scaled, r * d + j, r < rows ? load(q, from, 0) * scale : all(0), 0);
            store(given, r * d + j, r < rows ? load(dy, from, 0) : all(0), 0);
          }
        product(scaled, d, keys, padded, scores, padded, d, padded);
        product(given, d, values, padded, slopes, padded, d, padded);
        for (int r = 0; r < rows; r++) {
          float *p = scores + (int64_t)r * padded, *slope = slopes + (int64_t)r * padded;
          const float *hidden = mask;
          if (mask) hidden += (sequence * queries + (queries > 1 ? i + r : 0)) * padded;
          float inverse = softmax(p, hidden, tokens, padded);
          vec total = all(0);
          for (int j = 0; j < padded; j += LANES) {
            vec line = load(p, j, 0) * inverse;
            total += line * load(slope, j, 0);
            store(p, j, line, 0);
          }
          float shared = sum(total);
          for (int j = 0; j < padded; j += LANES)
            store(slope, j, load(p, j, 0) * (load(slope, j, 0) - shared), 0);
        }
        for (int64_t j = (int64_t)rows * padded; j < (int64_t)ROWS * padded; j += LANES) {
          store(scores, j, all(0), 0);
          store(slopes, j, all(0), 0);
        }
        add_outer(scores, padded, given, dv + at, width, tokens, d);
        add_outer(slopes, padded, scaled, dk + at, width, tokens, d);
        product(slopes, padded, k + at, width, out, d, tokens, d);
        for (int r = 0; r < rows; r++)
          for (int j = 0; j < d; j += LANES)
            store(dq, at + (i + r) * width + j, load(out, r * d + j, 0) * scale, 0);
      }
    }
    free(keys);
  }
  return failed;
}
