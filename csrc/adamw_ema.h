// AdamW, an exponential moving average and a bf16 copy of the weights, in one pass over many tensors. The formula and its source:
// kernels/vavae_kernels/ops/adamw_ema.py.
//
// A table of tensors travels as the argument of a kernel, not in device memory: a launch copies its arguments, so no table can be
// freed, overwritten or still be on its way while a kernel reads it, and a CUDA graph keeps its own. 32,764 bytes of arguments
// (CUDA 12.1 and later) hold 448 rows, LightningDiT-XL/1 has 349; more tensors take more launches.
//
// `block` is the work of one thread block, written as the work of one of its threads: the GPU runs it as a kernel, the host build in
// loops over blocks and lanes. Fused multiply-adds are written out and the compilers told to make no others: both give the same bits.
#pragma once

#include <algorithm>
#include <type_traits>

#include "storage.h"

namespace vavae {

// One row of eight 8-byte fields a parameter; the Python side writes the same. All streams of a row are dense and lie in one order.
struct AdamwTensor {
  void* param;
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  float* ema;      // null: none is kept
  bf16* copy;      // null: none is kept
  float* step;     // () steps taken before this one. null: no gradient, only the average and the copy follow
  int64_t numel;
};

// What a group of parameters shares. `lr_at` and `ema_decay_at`, where they are not null, stand in the place of lr and ema_decay.
struct AdamwSettings {
  double lr, beta1, beta2, eps, weight_decay, ema_decay;
  double log_beta1, log_beta2;
  const float* lr_at;
  const float* ema_decay_at;
  const float* grad_scale;  // null: 1
  const float* found_inf;   // null: 0
};

constexpr int kThreads = 256;
constexpr int kChunk = 1 << 14;  // elements of a thread block: 590 KB of fp32 traffic, long against its start
constexpr int kTensors = 448;    // rows of a table

struct AdamwTable {
  AdamwTensor tensors[kTensors];
  int32_t first_chunk[kTensors + 1];  // chunks of the rows before; the last one used is the number of thread blocks
  int32_t count;
  AdamwSettings settings;
};
static_assert(sizeof(AdamwTensor) == 64 && sizeof(AdamwSettings) == 96, "the Python side writes these structs");
static_assert(sizeof(AdamwTable) <= 32764, "CUDA's limit on the arguments of a kernel");

// Takes as many of `count` rows as fit into `table`; returns how many: 0 if the first alone has more chunks than a grid has blocks.
inline int64_t fill(AdamwTable& table, const AdamwTensor* rows, int64_t count, const AdamwSettings& settings) {
  int64_t chunks = 0;
  table.settings = settings;
  table.first_chunk[0] = 0;
  for (table.count = 0; table.count < std::min<int64_t>(count, kTensors); table.count++) {
    chunks += (rows[table.count].numel + kChunk - 1) / kChunk;
    if (chunks > INT32_MAX) break;
    table.tensors[table.count] = rows[table.count];
    table.first_chunk[table.count + 1] = int32_t(chunks);
  }
  return table.count;
}

// The row that chunk `chunk` belongs to: the last one with first_chunk <= chunk, so that rows without elements own none.
VAVAE_INLINE int row_of(const AdamwTable& table, int chunk) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_chunk[middle] <= chunk)
      low = middle;
    else
      high = middle;
  }
  return low;
}

VAVAE_INLINE bool skipped(const AdamwSettings& s) { return s.found_inf != nullptr && *s.found_inf != 0.0f; }

// Of one parameter at one step, rounded from fp64 once.
struct AdamwCoefficients {
  float inverse_scale;    // 1 / grad_scale
  float new_avg;          // 1 - beta1
  float beta2, new_sq;    // beta2, 1 - beta2
  float inverse_root;     // 1 / sqrt(1 - beta2^k)
  float eps, step_size;   // eps, lr / (1 - beta1^k)
  float decay, new_ema;   // 1 - lr weight_decay, 1 - ema_decay
};

VAVAE_INLINE AdamwCoefficients coefficients(const AdamwSettings& s, const float* steps_before) {
  const double lr = s.lr_at != nullptr ? double(*s.lr_at) : s.lr;
  const double ema_decay = s.ema_decay_at != nullptr ? double(*s.ema_decay_at) : s.ema_decay;
  const double k = steps_before != nullptr ? double(*steps_before) + 1.0 : 1.0;
  AdamwCoefficients c;
  c.inverse_scale = s.grad_scale != nullptr ? float(1.0 / double(*s.grad_scale)) : 1.0f;
  c.new_avg = float(1.0 - s.beta1);
  c.beta2 = float(s.beta2);
  c.new_sq = float(1.0 - s.beta2);
  c.inverse_root = float(1.0 / sqrt(-expm1(k * s.log_beta2)));  // expm1(-inf) = -1 serves beta = 0
  c.eps = float(s.eps);
  c.step_size = float(lr / -expm1(k * s.log_beta1));
  c.decay = float(1.0 - lr * s.weight_decay);
  c.new_ema = float(1.0 - ema_decay);
  return c;
}

// from + weight (to - from). Exact where from = to, and for a weight of 0 or 1.
VAVAE_INLINE float lerp(float from, float to, float weight) {
  return weight < 0.5f ? fmaf(weight, to - from, from) : fmaf(weight - 1.0f, to - from, to);
}

VAVAE_INLINE void adamw(float& p, float& m, float& v, float grad, const AdamwCoefficients& c) {
  const float g = grad * c.inverse_scale;
  m = lerp(m, g, c.new_avg);
  v = fmaf(c.new_sq * g, g, c.beta2 * v);
  p = fmaf(-c.step_size, m / fmaf(sqrtf(v), c.inverse_root, c.eps), c.decay * p);
}

// In the place of a storage type of gradients: the row has none, only the average and the copy follow.
struct no_grad {};

// N neighbouring elements of every stream of a row, in registers.
template <typename P, typename G, int N>
struct AdamwElements {
  static constexpr bool moves = !std::is_same_v<G, no_grad>;
  float param[N], grad[N], exp_avg[N], exp_avg_sq[N], ema[N];

  VAVAE_INLINE void read(const AdamwTensor& t, int64_t i) {
    load(static_cast<const P*>(t.param) + i, param);
    if (t.ema != nullptr) load(t.ema + i, ema);
    if constexpr (moves) {
      load(static_cast<const G*>(t.grad) + i, grad);
      load(t.exp_avg + i, exp_avg);
      load(t.exp_avg_sq + i, exp_avg_sq);
    }
  }

  VAVAE_INLINE void update(const AdamwTensor& t, const AdamwCoefficients& c) {
    for (int n = 0; n < N; n++) {
      if constexpr (moves) adamw(param[n], exp_avg[n], exp_avg_sq[n], grad[n], c);
      param[n] = widen(narrow<P>(param[n]));  // the average and the copy follow the weight as it is stored
      if (t.ema != nullptr) ema[n] = lerp(ema[n], param[n], c.new_ema);
    }
  }

  VAVAE_INLINE void write(const AdamwTensor& t, int64_t i) const {
    if constexpr (moves) {
      store(static_cast<P*>(t.param) + i, param);
      store(t.exp_avg + i, exp_avg);
      store(t.exp_avg_sq + i, exp_avg_sq);
    }
    if (t.ema != nullptr) store(t.ema + i, ema);
    if (t.copy != nullptr) store(t.copy + i, param);
  }
};

// Elements [begin, end), a multiple of N, shared out among the lanes; two vectors a lane and stream are in flight at a time.
template <typename P, typename G, int N>
VAVAE_INLINE void sweep(const AdamwTensor& t, const AdamwCoefficients& c, int64_t begin, int64_t end, int lane, int lanes) {
  const int64_t stride = int64_t(N) * lanes;
  int64_t i = begin + int64_t(N) * lane;
  for (; i + stride < end; i += 2 * stride) {
    AdamwElements<P, G, N> first, second;
    first.read(t, i);
    second.read(t, i + stride);
    first.update(t, c);
    second.update(t, c);
    first.write(t, i);
    second.write(t, i + stride);
  }
  if (i < end) {
    AdamwElements<P, G, N> last;
    last.read(t, i);
    last.update(t, c);
    last.write(t, i);
  }
}

// Vectors where every stream of the row allows them (a shard or a view may begin anywhere), then what is left element by element.
template <typename P, typename G>
VAVAE_INLINE void sweep_chunk(const AdamwTensor& t, const AdamwCoefficients& c, int64_t begin, int64_t end, int lane, int lanes) {
  const bool vectors = aligned<4>(static_cast<const P*>(t.param)) && aligned<4>(static_cast<const G*>(t.grad)) && aligned<4>(t.exp_avg) &&
                       aligned<4>(t.exp_avg_sq) && aligned<4>(t.ema) && aligned<4>(t.copy);
  const int64_t whole = vectors ? begin + (end - begin) / 4 * 4 : begin;
  sweep<P, G, 4>(t, c, begin, whole, lane, lanes);
  sweep<P, G, 1>(t, c, whole, end, lane, lanes);
}

// Thread `lane` of the `lanes` of thread block `chunk`.
template <typename P, typename G>
VAVAE_INLINE void block(const AdamwTable& table, int chunk, int lane, int lanes) {
  if (skipped(table.settings)) return;
  const int row = row_of(table, chunk);
  const AdamwTensor t = table.tensors[row];
  const AdamwCoefficients c = coefficients(table.settings, t.step);
  const int64_t begin = int64_t(chunk - table.first_chunk[row]) * kChunk;
  const int64_t end = t.numel - begin < kChunk ? t.numel : begin + kChunk;
  if (t.step != nullptr)
    sweep_chunk<P, G>(t, c, begin, end, lane, lanes);
  else
    sweep_chunk<P, no_grad>(t, c, begin, end, lane, lanes);
}

// Counts the step of row `row`, after all its elements have moved: a launch of its own, ordered behind theirs.
VAVAE_INLINE void count_step(const AdamwTable& table, int row) {
  if (row >= table.count || skipped(table.settings)) return;
  float* step = table.tensors[row].step;
  if (step != nullptr) *step += 1.0f;
}

// The storage type that the Python side gives as 0, 1 or 2: call(T()) for the T it means; false for another code.
template <typename Call>
bool with_storage(int code, Call call) {
  switch (code) {
    case 0: return call(float());
    case 1: return call(bf16());
    case 2: return call(fp16());
    default: return false;
  }
}

}  // namespace vavae
