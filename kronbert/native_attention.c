/* Attention of whole sequences: softmax(scale q kᵀ + mask) v, heads side by side, in float32 inside.
 *
 * One thread takes one head of one sequence: keys transposed and values copied to lie densely, then
 * six queries at a time, whose scores never leave the first cache. */

#include "native.c"

#define ROWS 6

/* c (ROWS, 16 wide) = a (ROWS, k) . b (k, 16 wide) */
INLINE void tile(const float *a, int64_t a_stride, const float *b, int64_t b_stride, float *c,
    int64_t c_stride, int k, int wide) {
  vec acc[ROWS][wide];
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < wide; j++) acc[i][j] = all(0);
  for (int p = 0; p < k; p++)
    for (int j = 0; j < wide; j++) {
      vec line = load(b, p * b_stride + j * LANES, 0);
      for (int i = 0; i < ROWS; i++) acc[i][j] += line * a[i * a_stride + p];
    }
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < wide; j++) store(c, i * c_stride + j * LANES, acc[i][j], 0);
}

/* c (ROWS, columns) = a (ROWS, k) . b (k, columns), columns a multiple of 16 */
static void product(const float *a, int64_t a_stride, const float *b, int64_t b_stride, float *c,
    int64_t c_stride, int k, int columns) {
  int j = 0;
  for (; j + 64 <= columns; j += 64) tile(a, a_stride, b + j, b_stride, c + j, c_stride, k, 4);
  if (columns - j == 48) tile(a, a_stride, b + j, b_stride, c + j, c_stride, k, 3);
  if (columns - j == 32) tile(a, a_stride, b + j, b_stride, c + j, c_stride, k, 2);
  if (columns - j == 16) tile(a, a_stride, b + j, b_stride, c + j, c_stride, k, 1);
}

/* target[j][i] = rows[i][j], 16 x 16 */
INLINE void turn(vec r[16], float *target, int64_t stride) {
  vec t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = PICK(r[i], r[i + 1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    t[i + 1] = PICK(r[i], r[i + 1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = i; j < i + 2; j++) {
      r[j] = PICK(t[j], t[j + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
      r[j + 2] = PICK(t[j], t[j + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = i; j < i + 4; j++) {
      t[j] = PICK(r[j], r[j + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
      t[j + 4] = PICK(r[j], r[j + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    }
  for (int j = 0; j < 8; j++) {
    r[j] = PICK(t[j], t[j + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    r[j + 8] = PICK(t[j], t[j + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
  for (int i = 0; i < 16; i++) store(target, i * stride, r[i], 0);
}

/* One head: keys (d, padded) and values (tokens, d) are filled from the rows of k and v */
INLINE void collect(const void *k, const void *v, const void *k_bias, const void *v_bias,
    int64_t at, int64_t column, int64_t stride, float *keys, float *values, int tokens, int padded,
    int d, int bf16) {
  for (int i = 0; i < padded; i += LANES)
    for (int j = 0; j < d; j += LANES) {
      vec rows[16];
      vec bias = k_bias ? load(k_bias, column + j, bf16) : all(0);
      for (int r = 0; r < 16; r++)
        rows[r] = i + r < tokens ? load(k, at + (i + r) * stride + j, bf16) + bias : all(0);
      turn(rows, keys + (int64_t)j * padded + i, padded);
    }
  for (int i = 0; i < tokens; i++)
    for (int j = 0; j < d; j += LANES) {
      vec line = load(v, at + i * stride + j, bf16);
      if (v_bias) line += load(v_bias, column + j, bf16);
      store(values, (int64_t)i * d + j, line, 0);
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
  int padded = (tokens + LANES - 1) / LANES * LANES, failed = 0;
#pragma omp parallel num_threads(threads)
  {
    int64_t numbers = (int64_t)padded * (2 * d + ROWS) + 2 * ROWS * d;
    float *keys = aligned_alloc(64, sizeof(float) * ((numbers + LANES - 1) / LANES * LANES));
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
      collect(k, v, k_bias, v_bias, at, column, width, keys, values, tokens, padded, d, bf16);
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
