// SPDX-License-Identifier: MIT
// One pass over flat buffers: AdamW with mask and clip, norms, spike clip, ranks, masks.  Loaded by native.py.
//
// The bits are those of torch's CPU kernels: every multiply-add that is fused here is fused there, and no other is, so
// this must be compiled without contraction.  native.py compares both before it uses this.
// Threads are those of the OpenMP that torch has loaded: a second pool would fight with the first one for cores.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

using i64 = int64_t;
using i32 = int32_t;

namespace {

constexpr i64 BLOCK = 1024;        // elements whose mask is unpacked at once: 4 KiB, in the first cache
constexpr i64 SMALL = 1 << 15;     // elements below which one thread is faster than two
constexpr i32 LOW = INT32_MIN;     // sign bit, and the key of what has no rank
constexpr i32 INFINITE = 0x7F800000;  // bits of inf; beyond are those of nan
constexpr i64 HALF = 1 << 15, BINS = 1 << 16, WAYS = 4;

using Eight = float __attribute__((vector_size(32)));
using Kept = int8_t;  // of one element: -1 stays, 0 goes

// the bytes of eight elements for each byte of bits, element j bit j
constexpr struct Bytes {
  Kept of[256][8] = {};
  constexpr Bytes() {
    for (i32 b = 0; b < 256; ++b)
      for (i32 j = 0; j < 8; ++j) of[b][j] = b >> j & 1 ? -1 : 0;
  }
} BYTES;

// Which elements stay.  Element 0 of the buffer at hand is element `first` of the mask; outside of it all stay.
struct Mask {
  const uint8_t* held;  // bytes, or bits; null: all stay
  i64 first, size;
  i32 bits;

  // of n <= BLOCK elements from `at` on; in `spare` where they are not there as bytes
  const Kept* of(i64 at, i64 n, Kept* spare) const {
    const i64 from = first + at;
    if (held && !bits && from >= 0 && from + n <= size) return (const Kept*)held + from;
    const i64 begin = std::max<i64>(0, -from), end = std::min(n, size - from);
    if (!held || begin > 0 || end < n) std::memset(spare, -1, n);
    if (!held) return spare;
    i64 i = begin;
    if (!bits)
      for (; i < end; ++i) spare[i] = held[from + i];
#ifdef __AVX512BW__
    for (; i + 64 <= end; i += 64) {
      __mmask64 word;
      std::memcpy(&word, held + (from + i) / 8, 8);
      _mm512_storeu_si512(spare + i, _mm512_movm_epi8(word));
    }
#endif
    for (; i < end; i += 8) {
      std::memcpy(spare + i, BYTES.of[held[(from + i) / 8]], 8);  // may pass the end: bits there are set, and `spare` is longer
    }
    return spare;
  }
};

// Scores that are ranked by keys in the order of floats, -0 as +0, and LOW where the mask says so.
struct Ranked {
  const float* score;
  i32 absolute;  // the sign does not count
  Mask mask;

  void keys(i64 at, i64 n, i32* __restrict out) const {
    Kept spare[BLOCK + 8];
    const Kept* __restrict keep = mask.of(at, n, spare);
    const float* __restrict from = score + at;
    const i32 drop = absolute ? ~LOW : -1;
    for (i64 i = 0; i < n; ++i) {
      const float s = from[i] + 0.0f;
      i32 b;
      std::memcpy(&b, &s, 4);
      b &= drop;
      out[i] = ((b ^ (b >> 31 | LOW)) & keep[i]) ^ LOW;
    }
  }
};

inline float both(float x, Kept kept) {
  i32 k;
  std::memcpy(&k, &x, 4);
  k &= kept;
  std::memcpy(&x, &k, 4);
  return x;
}

template <class F>
void blocks(i64 n, i64 size, i32 threads, F work) {
  const i64 count = (n + size - 1) / size;
#pragma omp parallel for num_threads(threads) schedule(static) if (n >= SMALL && threads > 1)
  for (i64 b = 0; b < count; ++b) work(b * size, std::min(size, n - b * size));
}

struct Rule {
  float scale, decay, rest1, beta2, rest2, root, eps, step;
};

// w, g, m, v, x and the mask of one block
template <bool original, bool scaled, bool amsgrad>
void update(const Rule& r, i64 n, float* __restrict w, const float* __restrict g, float* __restrict m,
            float* __restrict v, float* __restrict x, const Kept* __restrict keep) {
  const Rule c = r;
  for (i64 i = 0; i < n; ++i) {
    float grad = both(g[i], keep[i]), p = w[i];
    if (scaled) grad = grad / c.scale;
    if (original) grad = __builtin_fmaf(p, c.decay, grad);
    else p = p * c.decay;
    const float a = __builtin_fmaf(c.rest1, grad - m[i], m[i]);
    const float b = __builtin_fmaf(c.rest2 * grad, grad, v[i] * c.beta2);
    float top = b;
    if (amsgrad) {
      top = x[i] > b || x[i] != x[i] ? x[i] : b;
      x[i] = top;
    }
    m[i] = a;
    v[i] = b;
    w[i] = p + c.step * a / (std::sqrt(top) / c.root + c.eps);
  }
}

using Update = void (*)(const Rule&, i64, float*, const float*, float*, float*, float*, const Kept*);

template <bool... known, class... Rest>
Update pick(bool next, Rest... rest) {
  if constexpr (sizeof...(Rest) == 0) return next ? update<known..., true> : update<known..., false>;
  else return next ? pick<known..., true>(rest...) : pick<known..., false>(rest...);
}

}  // namespace

extern "C" {

// AdamW, or Adam where `original`, over n elements; x null: no AMSGrad.  *scale divides the gradients, *found = 1 is a
// step that must change nothing, *count the number of the step.  Gradients are read alone.  NOTE torch has another form
// of the first moment for beta1 <= 0.5.
void ablab_adam(i64 n, float* w, const float* g, float* m, float* v, float* x, const uint8_t* held, i64 first,
                i64 size, i32 bits, const float* scale, const float* found, const float* count, double lr,
                double decay, double beta1, double beta2, double eps, i32 original, i32 threads) {
  if (found && *found == 1.0f) return;
  const double t = *count, k1 = 1 - std::pow(beta1, t), k2 = 1 - std::pow(beta2, t);
  Rule r;
  r.scale = scale ? *scale : 1.0f;
  r.decay = original ? decay : 1 - lr * decay;
  r.rest1 = 1 - beta1, r.beta2 = beta2, r.rest2 = 1 - beta2, r.root = std::sqrt(k2), r.eps = eps, r.step = -(lr / k1);
  const Mask mask{held, first, size, bits};
  // torch adds no decay of 0: in Adam's gradient that tells -0 from +0
  const Update run = pick(bool(original) && decay != 0, scale != nullptr, x != nullptr);
  if (original && decay == 0) r.decay = 1.0f;
  blocks(n, BLOCK, threads, [&](i64 at, i64 k) {
    Kept spare[BLOCK + 8];
    run(r, k, w + at, g + at, m + at, v + at, x ? x + at : nullptr, mask.of(at, k, spare));
  });
}

// L2 norms of rows of `row` gradients under a mask, summed in 8 partial sums without fused operations, as torch does on
// every CPU
void ablab_norms(i64 rows, i64 row, const float* g, const uint8_t* held, i64 first, i64 size, i32 bits, float* out,
                 i32 threads) {
  const Mask mask{held, first, size, bits};
  blocks(rows * row, row, threads, [&](i64 at, i64 n) {
    Eight sum = {};
    Kept spare[BLOCK + 8];
    for (i64 from = at; from < at + n; from += BLOCK) {
      const Kept* keep = mask.of(from, BLOCK, spare);
      float part[BLOCK];
      for (i64 i = 0; i < BLOCK; ++i) part[i] = both(g[from + i], keep[i]);
      for (i64 i = 0; i < BLOCK; i += 8) {
        Eight x;
        std::memcpy(&x, part + i, sizeof x);
        sum += x * x;
      }
    }
    float total = sum[0];
    for (i64 j = 1; j < 8; ++j) total += sum[j];
    out[at / row] = std::sqrt(total);
  });
}

// SPAM: g within plus and minus sqrt(theta v); how many were not.  `lab`: where v is 0 nothing is clipped.  Most blocks
// hold no spike and are read alone; `margin` makes the search for one see more than there are, whatever it rounds.
i64 ablab_clip(i64 n, float* g, const float* v, const uint8_t* held, i64 first, i64 size, i32 bits, double theta,
               double margin, i32 lab, i32 threads) {
  const Mask mask{held, first, size, bits};
  const float less = -margin / theta, most = theta;
  i64 clipped = 0;
  blocks(n, BLOCK, threads, [&](i64 at, i64 k) {
    Kept spare[BLOCK + 8];
    const Kept* keep = mask.of(at, k, spare);
    float* gs = g + at;
    const float* vs = v + at;
    i32 any = 0;
    for (i64 i = 0; i < k; ++i) {
      const float x = both(gs[i], keep[i]);
      any |= !(vs[i] + less * x * x >= 0);
    }
    if (!any) return;
    i64 mine = 0;
    for (i64 i = 0; i < k; ++i) {
      const float x = both(gs[i], keep[i]);
      float top = vs[i] * most;
      top = std::sqrt(top != top ? INFINITY : top);
      if (lab && !(top > 0)) top = INFINITY;
      const float inside = x != x ? x : std::min(std::max(x, -top), top), off = x - inside;
      mine += off != 0;                           // a nan counts, as in torch.count_nonzero
      gs[i] = __builtin_fmaf(off, 0.0f, inside);  // 0 * inf is nan: the gate must see it
    }
    __atomic_fetch_add(&clipped, mine, __ATOMIC_RELAXED);
  });
  return clipped;
}

// x &= mask, over the bits of fp32
void ablab_mask(i64 n, i32* x, const uint8_t* held, i64 first, i64 size, i32 bits, i32 threads) {
  const Mask mask{held, first, size, bits};
  blocks(n, BLOCK, threads, [&](i64 at, i64 k) {
    Kept spare[BLOCK + 8];
    const Kept* keep = mask.of(at, k, spare);
    for (i64 i = 0; i < k; ++i) x[at + i] &= keep[i];
  });
}

// keys of scores
void ablab_keys(i64 n, const float* score, i32 absolute, const uint8_t* held, i64 first, i64 size, i32 bits, i32* keys,
                i32 threads) {
  const Ranked ranked{score, absolute, {held, first, size, bits}};
  blocks(n, BLOCK, threads, [&](i64 at, i64 k) { ranked.keys(at, k, keys + at); });
}

// Keys from `low` to `high`, in any order; found: how many are below, without a rank, of scores that are not finite, in
// `out`.
void ablab_near(i64 n, const float* score, i32 absolute, const uint8_t* held, i64 first, i64 size, i32 bits, i32 low,
                i32 high, i32* out, i64* found, i32 threads) {
  const Ranked ranked{score, absolute, {held, first, size, bits}};
  for (i64 j = 0; j < 4; ++j) found[j] = 0;
  blocks(n, BLOCK, threads, [&](i64 at, i64 k) {
    i32 key[BLOCK], mine[BLOCK + 1], below = 0, dead = 0, odd = 0, near = 0, some = 0;
    Kept in[BLOCK] = {};
    int16_t eights[BLOCK / 8];
    ranked.keys(at, k, key);
    for (i64 i = 0; i < k; ++i) {
      const i32 c = key[i];
      below += c < low;
      dead += c == LOW;
      odd += (c >= INFINITE) | ((c < -INFINITE) & (c != LOW));
      in[i] = (c >= low) & (c <= high);
    }
    for (i64 i = 0; i < k; i += 8) {  // most eights hold none
      uint64_t any;
      std::memcpy(&any, in + i, 8);
      eights[some] = i;
      some += any != 0;
    }
    for (i64 e = 0; e < some; ++e)
      for (i64 i = eights[e]; i < eights[e] + 8; ++i) {
        mine[near] = key[i];
        near += in[i];
      }
    const i64 counts[] = {below, dead, odd};
    for (i64 j = 0; j < 3; ++j)
      if (counts[j]) __atomic_fetch_add(found + j, counts[j], __ATOMIC_RELAXED);
    if (near) std::memcpy(out + __atomic_fetch_add(found + 3, near, __ATOMIC_RELAXED), mine, 4 * near);
  });
}

// Counts keys by their upper halves, or, with `bin` in -2^15 .. 2^15 - 1, those with that upper half by their lower
// ones; each thread in WAYS rows of its own, in turn: many keys are equal, and one counter would wait for itself.
void ablab_count(i64 n, const i32* keys, i64 bin, i32* bins, i32 threads) {
  const i64 share = (n + threads - 1) / threads;
  blocks(n, share, threads, [&](i64 at, i64 k) {
    i32* mine = bins + at / share * BINS * WAYS;
    if (bin < -HALF) {
      for (i64 i = at; i < at + k; ++i) ++mine[(keys[i] >> 16) + HALF + i % WAYS * BINS];
    } else {
      for (i64 from = at; from < at + k; from += 16) {  // most sixteens hold none
        const i64 end = std::min(from + 16, at + k);
        bool any = false;
        for (i64 i = from; i < end; ++i) any |= keys[i] >> 16 == bin;
        for (i64 i = from; any && i < end; ++i)
          if (keys[i] >> 16 == bin) ++mine[(keys[i] & 0xFFFF) + i % WAYS * BINS];
      }
    }
  });
}

// The mask over n scores, which may be what they are ranked under: those with keys above `key` stay, and of those equal
// to it all but the first `ties`; how many are equal.
i64 ablab_put(i64 n, const float* score, i32 absolute, const uint8_t* held, i64 first, i64 size, i32 bits, i32 key,
              i64 ties, uint8_t* out, i64 start, i32 packed) {
  const Ranked ranked{score, absolute, {held, first, size, bits}};
  i64 equal = 0;
  for (i64 at = 0; at < n; at += BLOCK) {
    const i64 k = std::min(BLOCK, n - at);
    i32 c[BLOCK];
    Kept stay[BLOCK + 8];
    ranked.keys(at, k, c);
    i32 same = 0;
    for (i64 i = 0; i < k; ++i) same += c[i] == key;
    if (equal < ties && equal + same > ties) {
      i64 seen = equal;
      for (i64 i = 0; i < k; ++i) stay[i] = -(c[i] > key || (c[i] == key && seen++ >= ties));
    } else {
      const i32 most = equal >= ties ? key : key + 1;  // of the equal ones all stay, or none; `key` is of a finite score
      for (i64 i = 0; i < k; ++i) stay[i] = -(c[i] >= most);
    }
    equal += same;
    if (!packed) {
      std::memcpy(out + start + at, stay, k);
      continue;
    }
    for (i64 i = k; i % 8; ++i) stay[i] = -1;
    for (i64 i = 0; i < k; i += 8) {
      uint64_t eight;
      std::memcpy(&eight, stay + i, 8);
      out[(start + at + i) / 8] = (eight & 0x0101010101010101) * 0x0102040810204080 >> 56;
    }
  }
  return equal;
}

// elements that a mask drops
i64 ablab_gone(const uint8_t* held, i64 first, i64 size, i32 bits, i32 threads) {
  const Mask mask{held, first, size, bits};
  i64 total = 0;
  blocks(size, BLOCK, threads, [&](i64 at, i64 k) {
    Kept spare[BLOCK + 8];
    const Kept* keep = mask.of(at, k, spare);
    i32 mine = 0;
    for (i64 i = 0; i < k; ++i) mine += keep[i];
    mine += k;
    __atomic_fetch_add(&total, mine, __ATOMIC_RELAXED);
  });
  return total;
}

// zeros of either sign among n fp32 numbers
i64 ablab_zeros(i64 n, const i32* x, i32 threads) {
  i64 total = 0;
  blocks(n, BLOCK, threads, [&](i64 at, i64 k) {
    i32 mine = 0;
    for (i64 i = 0; i < k; ++i) mine += (x[at + i] & ~LOW) == 0;
    __atomic_fetch_add(&total, mine, __ATOMIC_RELAXED);
  });
  return total;
}
}
