AOTITorchError aoti_torch_cpu_linear(AtenTensorHandle input, AtenTensorHandle panels, int64_t outputs,
                                     AtenTensorHandle* output);

// Linear layers of a compiled step in float32. As with attention.cpp, PyTorch's code generator writes this text into its
// own code.
//
// Weights lie in panels of 16 outputs, [panels, inputs, 16], so that they are read in the order of memory. They may be
// narrower than float32, in 16 bits or integers of 8, and are widened in registers. A tile computes up to six rows by 16
// outputs with its sums in registers, as in BLIS (Van Zee and van de Geijn, 2015).
extern "C++" {
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>

namespace linear {  // attention.cpp has the unnamed one

using Vec = at::vec::Vectorized<float>;
constexpr int64_t PANEL = 16;
constexpr int VECTORS = PANEL / Vec::size();
static_assert(VECTORS >= 1 && PANEL % Vec::size() == 0);
constexpr int64_t TILE = 6;    // rows of a tile: with 8 numbers a vector, its sums take 12 of 16 registers
constexpr int64_t BLOCK = 48;  // rows that a panel is used for before the next: most stay in the second-level cache
constexpr int64_t DEPTH = 768;  // inputs that are added up before they are added to the output, for accuracy
constexpr int64_t AHEAD = 2048;  // bytes of weights fetched before they are needed

inline Vec widen(const float* weights) { return Vec::loadu(weights); }
inline Vec widen(const at::BFloat16* weights) {
  Vec vector;
  at::vec::load_fp32_from_bf16(weights, vector);
  return vector;
}
inline Vec widen(const at::Half* weights) {
  Vec vector;
  at::vec::load_fp32_from_fp16(weights, vector);
  return vector;
}
inline Vec widen(const int8_t* weights) {
  using Bytes = at::vec::Vectorized<int8_t>;
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
  return at::vec::convert<float>(Bytes::loadu_one_fourth(weights));  // the other one goes through memory
#else
  return at::vec::convert<float>(Bytes::loadu(weights, Vec::size()));
#endif
}

// Where a tile reads and writes: the first of its rows, and how many numbers a row has.
struct Rows {
  const float* input;
  int64_t inputs;
  float* output;
  int64_t outputs;
};

// `depth` inputs of one panel times R rows, of which the first `written` outputs are written, or added if `more`. Few
// rows have several sums each: additions take four cycles, and two begin in each.
template <int R, typename T>
void tile(Rows rows, const T* panel, int64_t depth, int64_t written, bool more) {
  constexpr int SUMS = (8 + R * VECTORS - 1) / (R * VECTORS);
  Vec sums[SUMS][R][VECTORS];
#pragma GCC unroll 8
  for (int s = 0; s < SUMS; ++s)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sums[s][r][v] = Vec(0);
  const auto add = [&](int s, int64_t k) {
    Vec weights[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) weights[v] = widen(panel + k * PANEL + v * Vec::size());
    __builtin_prefetch(reinterpret_cast<const char*>(panel + k * PANEL) + AHEAD);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec x(rows.input[r * rows.inputs + k]);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sums[s][r][v] = at::vec::fmadd(x, weights[v], sums[s][r][v]);
    }
  };
  int64_t k = 0;
  for (; k + SUMS <= depth; k += SUMS)
#pragma GCC unroll 8
    for (int s = 0; s < SUMS; ++s) add(s, k + s);
  for (; k < depth; ++k) add(0, k);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      Vec sum = sums[0][r][v];
#pragma GCC unroll 8
      for (int s = 1; s < SUMS; ++s) sum = sum + sums[s][r][v];
      const int64_t count = std::min<int64_t>(written - v * Vec::size(), Vec::size());
      float* const output = rows.output + r * rows.outputs + v * Vec::size();
      if (count > 0) (more ? sum + Vec::loadu(output, count) : sum).store(output, count);
    }
}

template <typename T>
void linear(const at::Tensor& input, const at::Tensor& panels, at::Tensor& output) {
  const int64_t rows = input.size(0), inputs = input.size(1), outputs = output.size(1);
  const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
  const float* const in = input.const_data_ptr<float>();
  const T* const weights = panels.const_data_ptr<T>();
  float* const out = output.mutable_data_ptr<float>();
#pragma omp parallel for collapse(2) schedule(static) num_threads(at::get_num_threads())
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t panel = 0; panel < panels.size(0); ++panel)
      for (int64_t k = 0; k < inputs; k += DEPTH) {
        const T* const part = weights + (panel * inputs + k) * PANEL;
        const int64_t end = std::min(rows, (block + 1) * BLOCK);
        for (int64_t row = block * BLOCK; row < end;) {
          const auto of_rows = [&](auto count) {
            const Rows here{in + row * inputs + k, inputs, out + row * outputs + panel * PANEL, outputs};
            tile<count>(here, part, std::min(DEPTH, inputs - k), outputs - panel * PANEL, k > 0);
            row += count;
          };
          const int64_t left = end - row, tiles = (left + TILE - 1) / TILE;  // of heights as equal as can be
          switch ((left + tiles - 1) / tiles) {
            case 1: of_rows(std::integral_constant<int, 1>()); break;
            case 2: of_rows(std::integral_constant<int, 2>()); break;
            case 3: of_rows(std::integral_constant<int, 3>()); break;
            case 4: of_rows(std::integral_constant<int, 4>()); break;
            case 5: of_rows(std::integral_constant<int, 5>()); break;
            default: of_rows(std::integral_constant<int, TILE>());
          }
        }
      }
}

at::Tensor run(const at::Tensor& input, const at::Tensor& panels, int64_t outputs) {
  const at::Tensor rows = input.reshape({-1, input.size(-1)}).contiguous();
  at::Tensor output = at::empty({rows.size(0), outputs}, input.options());
  switch (panels.scalar_type()) {
    case at::kBFloat16: linear<at::BFloat16>(rows, panels, output); break;
    case at::kHalf: linear<at::Half>(rows, panels, output); break;
    case at::kChar: linear<int8_t>(rows, panels, output); break;
    default: linear<float>(rows, panels, output);
  }
  auto sizes = input.sizes().vec();
  sizes.back() = outputs;
  return output.view(sizes);
}

}  // namespace linear
}

AOTITorchError aoti_torch_cpu_linear(AtenTensorHandle input, AtenTensorHandle panels, int64_t outputs,
                                     AtenTensorHandle* output) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    const auto tensor = [](AtenTensorHandle handle) -> const at::Tensor& {
      return *torch::aot_inductor::tensor_handle_to_tensor_pointer(handle);
    };
    *output = torch::aot_inductor::new_tensor_handle(linear::run(tensor(input), tensor(panels), outputs));
  });
}
