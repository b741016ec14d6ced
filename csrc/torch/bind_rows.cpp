// On the CPU, their schemas defined in sfllava_fast/reduction/rows.py:
// sfllava_fast::select_rows(Tensor scores, Tensor table, Tensor(a!) kept, Tensor(b!) nan) -> ()
// sfllava_fast::copy_rows(Tensor[] tensors, Tensor index, Tensor(a!)[] out) -> ()
// sfllava_fast::replace_rows(Tensor hidden, Tensor index, Tensor rows, Tensor(a!) out) -> ()
// sfllava_fast::blend_rows(Tensor hidden, Tensor index, Tensor rows, Tensor weights, Tensor(a!) out) -> ()
// sfllava_fast::receive_attention(Tensor queries, Tensor keys, float scale, Tensor(a!) out) -> ()

#include <atomic>
#include <cstring>
#include <memory>

#include "../cpu/attention.h"
#include "../cpu/rows.h"
#include "library.h"

namespace {

using namespace sfllava;

constexpr int64_t kLine = 64;
constexpr int64_t kLeastBytes = 1 << 20;  // that a thread moves

void check_on_cpu(const Tensor& tensor, int64_t dim) {
  check(tensor.on(aoti_torch_device_type_cpu()) && tensor.dim() == dim, "a tensor is not on the CPU, or of another shape");
}

template <class Byte>
cpu::RowsOf<Byte> rows_of(const Tensor& tensor) {
  check_on_cpu(tensor, 3);
  check(tensor.size(2) <= 1 || tensor.stride(2) == 1, "rows need unit stride over channels");
  const int64_t size = tensor.element_size();
  return {static_cast<Byte*>(tensor.data()), tensor.stride(0) * size, tensor.stride(1) * size};
}

cpu::Index index_of(const Tensor& index) {
  check_on_cpu(index, 2);
  check(index.dtype() == aoti_torch_dtype_int64(), "the index must be int64");
  return {static_cast<const int64_t*>(index.data()), index.stride(0), index.stride(1), index.size(1)};
}

void check_shape(const Tensor& tensor, int64_t batch, int64_t rows, const Tensor& like) {
  check(tensor.size(0) == batch && tensor.size(1) == rows && tensor.size(2) == like.size(2) &&
            tensor.dtype() == like.dtype(),
        "rows must have the dtype and the channels of hidden, and be as many as the index says");
}

void copy(const Tensor& from, const Tensor& index, const Tensor& to) {
  const cpu::Copy copy{rows_of<const char>(from), from.size(1), rows_of<char>(to), index_of(index),
                       from.size(2) * from.element_size()};
  check(from.size(0) == index.size(0), "tensors and index must be of one batch");
  check_shape(to, index.size(0), index.size(1), from);
  parallel_for(index.size(0) * index.size(1), copy.bytes, kLeastBytes,
               [&](int64_t begin, int64_t end) { cpu::copy_rows(copy, begin, end); });
}

// Stores go around the cache where the output would not fit there anyway and its rows are lines of the cache.
bool should_stream(const cpu::OutRows& out, int64_t rows, int64_t bytes) {
  constexpr int64_t kLarge = 16 << 20;
  const int64_t low_bits = reinterpret_cast<intptr_t>(out.data) | out.batch_stride | out.row_stride | bytes;
  return low_bits % kLine == 0 && rows * bytes >= kLarge;
}

void merge(const Tensor& hidden, const Tensor& index, const Tensor& rows, const Tensor* weights, const Tensor& out) {
  cpu::Merge merge;
  merge.hidden = rows_of<const char>(hidden);
  merge.rows = rows_of<const char>(rows);
  merge.out = rows_of<char>(out);
  merge.index = index_of(index);
  const int64_t batch = hidden.size(0);
  check(index.size(0) == batch, "hidden and index must be of one batch");
  check_shape(rows, batch, index.size(1), hidden);
  check_shape(out, batch, hidden.size(1), hidden);
  if (weights) {
    check_on_cpu(*weights, 2);
    check(weights->dtype() == aoti_torch_dtype_float32() && weights->is_contiguous_like(index),
          "weights must be float32, contiguous, and as many as the index");
    merge.dtype = kernel_dtype(hidden.dtype());
    merge.weights = static_cast<const float*>(weights->data());
  }
  merge.hidden_rows = hidden.size(1);
  merge.bytes = hidden.size(2) * hidden.element_size();
  merge.in_place = out.data() == hidden.data();
  check(!merge.in_place || (out.stride(0) == hidden.stride(0) && out.stride(1) == hidden.stride(1)),
        "in place, out must be hidden itself");
  merge.stream = !merge.in_place && should_stream(merge.out, batch * merge.hidden_rows, merge.bytes);
  parallel_for(batch * cpu::tasks_of_each(merge), merge.bytes, kLeastBytes,
               [&](int64_t begin, int64_t end) { cpu::merge_rows(merge, begin, end); });
}

void select(const Tensor& scores, const Tensor& table, const Tensor& kept, const Tensor& nan) {
  check_on_cpu(scores, 2);
  check_on_cpu(table, 2);
  check_on_cpu(kept, 2);
  check(table.dtype() == aoti_torch_dtype_int32() && table.size(1) == 4 && table.stride(1) == 1 && table.stride(0) == 4,
        "the table must be [frames, 4], contiguous int32");
  const auto* frames = static_cast<const cpu::Frame*>(table.data());
  const int64_t batch = scores.size(0), count = table.size(0);
  const int64_t start = count ? frames[0].begin : 0;
  for (int64_t i = 0; i < count; ++i) {
    const cpu::Frame& f = frames[i];
    const bool inside = f.begin >= start && f.begin - start + int64_t{f.tokens} <= scores.size(1) && f.kept > 0 &&
                        f.kept <= f.tokens && f.first >= 0 && int64_t{f.first} + f.kept <= kept.size(1);
    check(inside, "the table's frames do not fit the scores");
  }
  check(kept.dtype() == aoti_torch_dtype_int64() && kept.size(0) == batch && kept.stride(1) == 1 &&
            kept.stride(0) == kept.size(1) && nan.dtype() == aoti_torch_dtype_int32(),
        "the result must be int64, contiguous, and the flag int32");
  const cpu::Selection selection{scores.data(), scores.stride(0), scores.stride(1), kernel_dtype(scores.dtype()),
                                 frames, count, start, static_cast<int64_t*>(kept.data()), kept.size(1)};
  std::atomic<bool> sound{true};
  parallel_for(batch * count, scores.size(1) / std::max<int64_t>(1, count), 1 << 13, [&](int64_t begin, int64_t end) {
    if (!cpu::select_rows(selection, begin, end)) sound = false;
  });
  if (!sound) *static_cast<int32_t*>(nan.data()) = 1;
}

void receive(const Tensor& queries, const Tensor& keys, double scale, const Tensor& out) {
  check_on_cpu(queries, 4);
  check_on_cpu(keys, 4);
  check_on_cpu(out, 2);
  const int64_t batch = keys.size(0), tokens = keys.size(2);
  check(queries.size(0) == batch && queries.size(3) == keys.size(3) && queries.dtype() == keys.dtype() &&
            keys.size(1) > 0 && queries.size(1) % keys.size(1) == 0 && queries.size(2) <= tokens &&
            queries.stride(3) == 1 && keys.stride(3) == 1,
        "queries must be [B, H, M, d] and keys [B, G, N, d] of one dtype with unit stride over channels");
  check(out.dtype() == aoti_torch_dtype_float32() && out.size(0) == batch && out.size(1) == tokens &&
            out.stride(1) == 1 && out.stride(0) == tokens,
        "the result must be [B, N], contiguous float32");
  cpu::Attention attention{queries.data(), {queries.stride(0), queries.stride(1), queries.stride(2)},
                           keys.data(),    {keys.stride(0), keys.stride(1), keys.stride(2)},
                           kernel_dtype(keys.dtype()),
                           batch, queries.size(1), keys.size(1), queries.size(2), tokens, keys.size(3),
                           static_cast<float>(scale), nullptr, static_cast<float*>(out.data())};
  if (out.size(0) * out.size(1) * queries.size(2) == 0) return;
  const int64_t tasks = cpu::count_tasks(attention);
  const std::unique_ptr<float[]> parts(new float[tasks * tokens]);
  attention.parts = parts.get();
  parallel_for(tasks, tokens * keys.size(3), 1 << 16, [&](int64_t begin, int64_t end) { cpu::attend(attention, begin, end); });
  parallel_for(batch * tokens, tasks / batch, 1 << 16,
               [&](int64_t begin, int64_t end) { cpu::add_parts(attention, begin, end); });
}

void boxed_select(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor scores(stack[0]), table(stack[1]), kept(stack[2]), nan(stack[3]);
  select(scores, table, kept, nan);
}

void boxed_copy(StableIValue* stack, uint64_t, uint64_t) {
  const std::vector<Tensor> tensors = tensor_list(stack[0]);
  const Tensor index(stack[1]);
  const std::vector<Tensor> out = tensor_list(stack[2]);
  check(tensors.size() == out.size(), "there must be one result for each tensor");
  for (size_t i = 0; i < tensors.size(); ++i) copy(tensors[i], index, out[i]);
}

void boxed_replace(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor hidden(stack[0]), index(stack[1]), rows(stack[2]), out(stack[3]);
  merge(hidden, index, rows, nullptr, out);
}

void boxed_blend(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor hidden(stack[0]), index(stack[1]), rows(stack[2]), weights(stack[3]), out(stack[4]);
  merge(hidden, index, rows, &weights, out);
}

void boxed_receive(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor queries(stack[0]), keys(stack[1]), out(stack[3]);
  double scale;
  std::memcpy(&scale, &stack[2], sizeof scale);
  receive(queries, keys, scale, out);
}

const CpuKernels kernels = {{"select_rows", boxed_select},
                            {"copy_rows", boxed_copy},
                            {"replace_rows", boxed_replace},
                            {"blend_rows", boxed_blend},
                            {"receive_attention", boxed_receive}};

}  // namespace
