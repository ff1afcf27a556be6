// Counts |x| of many tensors in one launch, in the bins of histogram.py: a bin holds the magnitudes
// that share the upper 15 bits of a float32 without its sign.
//
// A block counts one piece of one tensor. Nearly all values of a network lie within 64 powers of
// two; their bins stand in shared memory, the others are added to the table in device memory at
// once. Zeros, of which a ReLU gives many, are counted in a register.

constexpr int SHIFT = 16;
constexpr int BINS = 1 << (31 - SHIFT);
constexpr int LOWEST = (127 - 40) << (23 - SHIFT);  // the bin of 2^-40
constexpr int WINDOW = 64 << (23 - SHIFT);
constexpr unsigned INFINITE = 0x7f800000u;

struct Tensor {
  unsigned long long data;
  long long inner;  // values that lie together and belong to one picture
  int pictures;
  int kind;  // 0 float32, 1 float16, 2 float64
};

struct Piece {
  long long start;
  int length;
  int tensor;
};

__device__ __forceinline__ unsigned magnitude(const Tensor& t, long long i) {
  float x;
  if (t.kind == 0) {
    x = reinterpret_cast<const float*>(t.data)[i];
  } else if (t.kind == 1) {
    const unsigned short half = reinterpret_cast<const unsigned short*>(t.data)[i];
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
  } else {
    x = static_cast<float>(reinterpret_cast<const double*>(t.data)[i]);
  }
  return __float_as_uint(x) & 0x7fffffffu;
}

struct Counting {
  unsigned* window;
  unsigned* table;
  unsigned zeros;

  __device__ __forceinline__ void add(unsigned bits) {
    const unsigned bin = bits >> SHIFT;
    const unsigned near = bin - LOWEST;
    if (near < WINDOW) {
      atomicAdd(window + near, 1u);
    } else if (bin == 0) {
      ++zeros;
    } else {
      atomicAdd(table + bin, 1u);
    }
  }
};

// Infinity has a bin and is no maximum; NaN lies above it and is the largest of all.
__device__ __forceinline__ unsigned larger(unsigned most, unsigned bits) {
  return max(most, bits == INFINITE ? 0u : bits);
}

extern "C" __global__ void __launch_bounds__(512)
    count(const Tensor* tensors, const Piece* pieces, unsigned* counts, unsigned* maxima,
          int stride, int valid) {
  __shared__ unsigned window[WINDOW];
  __shared__ unsigned most_of_all;
  const Piece piece = pieces[blockIdx.x];
  const Tensor t = tensors[piece.tensor];
  unsigned* largest = maxima + static_cast<size_t>(piece.tensor) * stride;
  const long long first = piece.start / t.inner;
  const bool alone = first == (piece.start + piece.length - 1) / t.inner;
  const int picture = static_cast<int>(first % t.pictures);
  if (alone && picture >= valid) return;  // a picture that only fills up the batch

  for (int i = threadIdx.x; i < WINDOW; i += blockDim.x) window[i] = 0;
  if (threadIdx.x == 0) most_of_all = 0;
  __syncthreads();

  Counting counting{window, counts + static_cast<size_t>(piece.tensor) * BINS, 0};
  unsigned most = 0;
  const long long end = piece.start + piece.length;
  if (!alone) {
    for (long long i = piece.start + threadIdx.x; i < end; i += blockDim.x) {
      const int p = static_cast<int>((i / t.inner) % t.pictures);
      if (p >= valid) continue;
      const unsigned bits = magnitude(t, i);
      counting.add(bits);
      const unsigned here = larger(0, bits);
      if (here > largest[p]) atomicMax(largest + p, here);
    }
  } else if (t.kind == 0 && ((t.data >> 2) + piece.start) % 4 == 0) {
    const float4* fours = reinterpret_cast<const float4*>(
        reinterpret_cast<const float*>(t.data) + piece.start);
    for (int i = threadIdx.x; i < piece.length / 4; i += blockDim.x) {
      const float4 v = fours[i];
      const unsigned b[4] = {
          __float_as_uint(v.x) & 0x7fffffffu, __float_as_uint(v.y) & 0x7fffffffu,
          __float_as_uint(v.z) & 0x7fffffffu, __float_as_uint(v.w) & 0x7fffffffu};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        counting.add(b[k]);
        most = larger(most, b[k]);
      }
    }
    for (long long i = end - piece.length % 4 + threadIdx.x; i < end; i += blockDim.x) {
      const unsigned bits = magnitude(t, i);
      counting.add(bits);
      most = larger(most, bits);
    }
  } else {
    for (long long i = piece.start + threadIdx.x; i < end; i += blockDim.x) {
      const unsigned bits = magnitude(t, i);
      counting.add(bits);
      most = larger(most, bits);
    }
  }

  for (int offset = 16; offset; offset >>= 1) {
    most = max(most, __shfl_xor_sync(0xffffffffu, most, offset));
    counting.zeros += __shfl_xor_sync(0xffffffffu, counting.zeros, offset);
  }
  if (threadIdx.x % 32 == 0) {
    if (counting.zeros) atomicAdd(counting.table, counting.zeros);
    atomicMax(&most_of_all, most);
  }
  __syncthreads();
  if (alone && threadIdx.x == 0) atomicMax(largest + picture, most_of_all);
  for (int i = threadIdx.x; i < WINDOW; i += blockDim.x) {
    if (window[i]) atomicAdd(counting.table + LOWEST + i, window[i]);
  }
}
