// The CUDA kernels as functions of a shared library that runs them on the CPU; tests/test_cuda_emulation.py calls them.
#include "density_mask_kernels.cuh"
#include "masked_statistics_kernels.cuh"
#include "normalisation_kernels.cuh"

namespace {

using namespace sib_ext;
using namespace sib_ext::cuda;

// Memory for a call's temporaries: each its own allocation, full of garbage, so that a checker sees where one ends.
class Allocations {
 public:
  Device device(int64_t shared_bytes, int multiprocessors, bool tensor_cores = false) {
    return {nullptr, multiprocessors, shared_bytes, tensor_cores, [this](int64_t bytes) {
              blocks_.emplace_back(new unsigned char[bytes]);
              std::memset(blocks_.back().get(), 0xff, bytes);
              return blocks_.back().get();
            }};
  }

 private:
  std::vector<std::unique_ptr<unsigned char[]>> blocks_;
};

Layout layout(int channels, int64_t pixels, bool channels_last) {
  return channels_last ? Layout{channels * pixels, 1, channels} : Layout{channels * pixels, pixels, 1};
}

template <class F>
void with_type(int type, F f) {
  switch (type) {
    case 0: return f(double{});
    case 1: return f(float{});
    case 2: return f(__nv_bfloat16{});
    default: return f(__half{});
  }
}

struct MaskArguments {
  int64_t type, batch, channels, height, width, channels_last, radius, count_padding, shared_bytes;
  double temperature, slope, eps, level;

  MaskProblem problem() const {
    MaskProblem o{batch,  static_cast<int>(channels), static_cast<int>(height), static_cast<int>(width),
                  layout(channels, height * width, channels_last),
                  radius, count_padding != 0,         slope, eps, {}};
    const int64_t n = height * width, size = support_size(n, temperature);
    const double q[3] = {kLow, kHigh, level};
    for (int i = 0; i < 3; ++i) o.quantiles[i] = soft_quantile(n, q[i], temperature, size);
    return o;
  }
};

struct StatisticsArguments {
  int64_t type, batch, channels, pixels, channels_last_R, channels_last_x, multiprocessors, tensor_cores;

  template <class S>
  Fields<S> fields(const void* R, const void* x, const void* M) const {
    const int c = static_cast<int>(channels);
    return make_fields(static_cast<const S*>(R), static_cast<const S*>(x), static_cast<const Accumulate<S>*>(M),
                       layout(c, pixels, channels_last_R), layout(c, pixels, channels_last_x), batch, c, pixels);
  }
};

struct NormArguments {
  int64_t type, batch, channels, groups, length, over_batch, channels_last, multiprocessors;

  Normalisation shape() const { return {batch, channels, groups, length, over_batch != 0}; }

  template <class S>
  NormFields<S> fields(const void* v, const void* g, const void* x, const void* mean, const void* rstd,
                       const void* weight) const {
    using T = Accumulate<S>;
    return {static_cast<const S*>(v),       static_cast<const S*>(g),    static_cast<const S*>(x),
            static_cast<const T*>(mean),    static_cast<const T*>(rstd), static_cast<const T*>(weight),
            channels_last != 0};
  }
};

}  // namespace

extern "C" {

void set_order(int order) { emulation::order = static_cast<emulation::Order>(order); }

void density_mask(const MaskArguments* a, const void* R, void* mask, int64_t* support) {
  Allocations memory;
  with_type(a->type, [&](auto type) {
    using S = decltype(type);
    mask_forward(static_cast<const S*>(R), a->problem(), memory.device(a->shared_bytes, 4),
                 static_cast<Accumulate<S>*>(mask), support);
  });
}

void density_mask_backward(const MaskArguments* a, const void* grad_mask, const void* R, const void* mask,
                           const int64_t* support, void* grad) {
  Allocations memory;
  with_type(a->type, [&](auto type) {
    using S = decltype(type);
    using T = Accumulate<S>;
    mask_backward(static_cast<const T*>(grad_mask), static_cast<const S*>(R), static_cast<const T*>(mask), support,
                  a->problem(), memory.device(a->shared_bytes, 4), static_cast<S*>(grad));
  });
}

void masked_statistics(const StatisticsArguments* a, const void* R, const void* x, const void* M, void* moments,
                       void* gram_R, void* gram_x) {
  Allocations memory;
  with_type(a->type, [&](auto type) {
    using S = decltype(type);
    using T = Accumulate<S>;
    statistics_forward(a->fields<S>(R, x, M), memory.device(227 * 1024, a->multiprocessors, a->tensor_cores), static_cast<T*>(moments),
                       static_cast<T*>(gram_R), static_cast<T*>(gram_x));
  });
}

void masked_statistics_backward(const StatisticsArguments* a, const void* grad_moments, const void* grad_gram_R,
                                const void* grad_gram_x, const void* R, const void* x, const void* M, void* grad_R,
                                void* grad_x, void* grad_M) {
  Allocations memory;
  with_type(a->type, [&](auto type) {
    using S = decltype(type);
    using T = Accumulate<S>;
    const StatisticsGradients<S> grad{static_cast<const T*>(grad_moments), static_cast<const T*>(grad_gram_R),
                                      static_cast<const T*>(grad_gram_x),  static_cast<S*>(grad_R),
                                      static_cast<S*>(grad_x),             static_cast<T*>(grad_M)};
    statistics_backward(a->fields<S>(R, x, M), grad, memory.device(227 * 1024, a->multiprocessors, a->tensor_cores));
  });
}

void norm_double_backward(const NormArguments* a, const void* v, const void* g, const void* x, const void* mean,
                          const void* rstd, const void* weight, void* grad_g, void* grad_x, void* grad_weight) {
  Allocations memory;
  with_type(a->type, [&](auto type) {
    using S = decltype(type);
    using T = Accumulate<S>;
    norm_backward<S, true>(a->shape(), a->fields<S>(v, g, x, mean, rstd, weight),
                           {static_cast<S*>(grad_g), static_cast<S*>(grad_x), static_cast<T*>(grad_weight), nullptr},
                           memory.device(0, a->multiprocessors));
  });
}

void batch_norm_backward(const NormArguments* a, const void* grad, const void* x, const void* mean, const void* rstd,
                         const void* weight, void* grad_x, void* grad_weight, void* grad_bias) {
  Allocations memory;
  with_type(a->type, [&](auto type) {
    using S = decltype(type);
    using T = Accumulate<S>;
    norm_backward<S, false>(a->shape(), a->fields<S>(grad, nullptr, x, mean, rstd, weight),
                            {static_cast<S*>(grad_x), nullptr, static_cast<T*>(grad_weight), static_cast<T*>(grad_bias)},
                            memory.device(0, a->multiprocessors));
  });
}

}  // extern "C"
