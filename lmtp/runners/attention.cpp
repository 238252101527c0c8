AOTITorchError aoti_torch_cpu_attend(AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value,
                                     AtenTensorHandle mask, double scale, AtenTensorHandle* output);

// Attention of a compiled step. PyTorch's code generator writes this text into its own code, between
// `extern "C" { extern` and `}`: hence the declaration in front.
//
// Decoding and drafts have few queries for a key head. Each row reads only the columns between the first and the last
// that its masks show, and the queries that share a key head read its keys and values once. PyTorch's own attention
// reads the columns of the longest row for every row. It serves longer chunks, where it is faster.
extern "C++" {
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t WIDTH = Vec::size();
constexpr int64_t MAX_QUERIES = 16;  // for a row and key head; with more, PyTorch's own attention is as fast
constexpr int64_t AHEAD = 512;  // numbers fetched before they are needed: eight columns of 64

inline Vec load(const float* numbers) { return Vec::loadu(numbers); }
inline Vec load(const at::BFloat16* numbers) {
  Vec vector;
  at::vec::load_fp32_from_bf16(numbers, vector);
  return vector;
}

// A tensor [rows, heads, places, dim] whose last stride is 1.
template <typename T>
struct View {
  const T* data;
  int64_t row, head, place;
  explicit View(const at::Tensor& tensor)
      : data(tensor.const_data_ptr<T>()), row(tensor.stride(0)), head(tensor.stride(1)), place(tensor.stride(2)) {}
  const T* at(int64_t r, int64_t h, int64_t p) const { return data + r * row + h * head + p * place; }
};

// Scores of N queries for one column. The sums stay in registers because the loops over N are unrolled.
template <int N, typename T>
void score(const float* queries, const T* key, int64_t dim, float* scores, int64_t columns) {
  Vec sums[N];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) sums[n] = Vec(0);
  for (int64_t d = 0; d < dim; d += WIDTH) {
    const Vec k = load(key + d);
    __builtin_prefetch(key + d + AHEAD);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sums[n] = at::vec::fmadd(Vec::loadu(queries + n * dim + d), k, sums[n]);
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n)
    scores[n * columns] = at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, sums[n]);
}

// Adds the weighted values of C neighbouring columns to the outputs of N queries.
template <int N, int C, typename T>
void mix(const float* weights, int64_t columns, const T* values, int64_t stride, float* outputs, int64_t dim) {
  for (int64_t d = 0; d < dim; d += WIDTH) {
    Vec v[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      v[c] = load(values + c * stride + d);
      __builtin_prefetch(values + c * stride + d + AHEAD);
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      Vec sum = Vec::loadu(outputs + n * dim + d);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum = at::vec::fmadd(Vec(weights[n * columns + c]), v[c], sum);
      sum.store(outputs + n * dim + d);
    }
  }
}

// Calls f for each group of at most four queries, with the number of the first and the size as a constant.
template <typename F>
void in_groups(int64_t queries, F f) {
  int64_t n = 0;
  for (; n + 4 <= queries; n += 4) f(n, std::integral_constant<int, 4>());
  if (queries - n == 3) f(n, std::integral_constant<int, 3>());
  if (queries - n == 2) f(n, std::integral_constant<int, 2>());
  if (queries - n == 1) f(n, std::integral_constant<int, 1>());
}

// Where every score is -inf, all weights are 0, as in PyTorch.
void softmax(float* scores, int64_t size) {
  const auto add = [](Vec& a, Vec& b) { return a + b; };
  const auto max = [](Vec& a, Vec& b) { return at::vec::maximum(a, b); };
  const float largest =
      std::max(at::vec::reduce_all<float>(max, scores, size), std::numeric_limits<float>::lowest());
  at::vec::map<float>([=](Vec x) { return (x - Vec(largest)).exp_u20(); }, scores, scores, size);
  const float total = at::vec::reduce_all<float>(add, scores, size);
  const Vec factor(total > 0 ? 1 / total : 0.0f);
  at::vec::map<float>([=](Vec x) { return x * factor; }, scores, scores, size);
}

template <typename T>
void attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& mask,
            float scale, at::Tensor& output) {
  const int64_t rows = query.size(0), heads = query.size(1), q = query.size(2), dim = query.size(3);
  const int64_t key_heads = key.size(1), columns = key.size(2), out_dim = value.size(3);
  const int64_t group = heads / key_heads, queries = group * q;
  const View<T> Q(query), K(key), V(value), M(mask);
  T* const out = output.mutable_data_ptr<T>();
  const T hidden = std::numeric_limits<T>::lowest() / 2;  // the mask's lowest plus any bias is less
#pragma omp parallel for schedule(dynamic) num_threads(at::get_num_threads())
  for (int64_t item = 0; item < rows * key_heads; ++item) {
    const int64_t row = item / key_heads, key_head = item % key_heads;
    const auto of_query = [&](const View<T>& view, int64_t n) { return view.at(row, key_head * group + n / q, n % q); };
    int64_t first = columns, end = 0;
    for (int64_t n = 0; n < queries; ++n) {
      const T* m = of_query(M, n);
      int64_t c = columns;
      while (c > end && m[c - 1] <= hidden) --c;
      end = c;
      for (c = 0; c < first && m[c] <= hidden;) ++c;
      first = c;
    }
    if (end == 0) first = 0, end = columns;  // it sees nothing, and nobody reads its output
    const int64_t seen = end - first;

    std::vector<float> memory(queries * (seen + dim + out_dim));  // zeros
    float *scores = memory.data(), *scaled = scores + queries * seen, *mixed = scaled + queries * dim;
    for (int64_t n = 0; n < queries; ++n) {
      const T* from = of_query(Q, n);
      for (int64_t d = 0; d < dim; d += WIDTH) (load(from + d) * Vec(scale)).store(scaled + n * dim + d);
    }
    for (int64_t c = 0; c < seen; ++c)
      in_groups(queries, [&](int64_t n, auto size) {
        score<size()>(scaled + n * dim, K.at(row, key_head, first + c), dim, scores + n * seen + c, seen);
      });
    for (int64_t n = 0; n < queries; ++n) {
      const T* m = of_query(M, n) + first;
      for (int64_t c = 0; c < seen; ++c) scores[n * seen + c] += static_cast<float>(m[c]);
      softmax(scores + n * seen, seen);
    }
    for (int64_t c = 0; c < seen;) {
      const T* values = V.at(row, key_head, first + c);
      const bool four = c + 4 <= seen;
      in_groups(queries, [&](int64_t n, auto size) {
        const float* weights = scores + n * seen + c;
        four ? mix<size(), 4>(weights, seen, values, V.place, mixed + n * out_dim, out_dim)
             : mix<size(), 1>(weights, seen, values, V.place, mixed + n * out_dim, out_dim);
      });
      c += four ? 4 : 1;
    }
    for (int64_t n = 0; n < queries; ++n) {
      const int64_t place = (row * q + n % q) * heads + key_head * group + n / q;
      at::vec::convert(mixed + n * out_dim, out + place * out_dim, out_dim);
    }
  }
}

// Returns [rows, q, heads, dim].
at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& mask,
                     double scale) {
  const int64_t rows = query.size(0), heads = query.size(1), q = query.size(2);
  const at::Tensor own_mask = mask.expand({rows, heads, q, key.size(2)});
  const bool whole_vectors = query.size(3) % WIDTH == 0 && value.size(3) % WIDTH == 0 && query.stride(3) == 1 &&
                             key.stride(3) == 1 && value.stride(3) == 1 && own_mask.stride(3) == 1;
  const auto dtype = query.scalar_type();
  if (!whole_vectors || heads / key.size(1) * q > MAX_QUERIES || (dtype != at::kFloat && dtype != at::kBFloat16))
    return at::scaled_dot_product_attention(query, key, value, mask, 0, false, scale, /*enable_gqa=*/true)
        .transpose(1, 2)
        .contiguous();
  at::Tensor output = at::empty({rows, q, heads, value.size(3)}, query.options());
  dtype == at::kFloat ? attend<float>(query, key, value, own_mask, scale, output)
                      : attend<at::BFloat16>(query, key, value, own_mask, scale, output);
  return output;
}

}  // namespace
}

AOTITorchError aoti_torch_cpu_attend(AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value,
                                     AtenTensorHandle mask, double scale, AtenTensorHandle* output) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    const auto tensor = [](AtenTensorHandle handle) -> const at::Tensor& {
      return *torch::aot_inductor::tensor_handle_to_tensor_pointer(handle);
    };
    *output = torch::aot_inductor::new_tensor_handle(
        attention(tensor(query), tensor(key), tensor(value), tensor(mask), scale));
  });
}
