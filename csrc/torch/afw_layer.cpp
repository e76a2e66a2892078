// A layer of AFW without Python between torch and libada2i_cpu, or on a GPU libada2i_cuda: checks, memory, the calls, and its node in autograd's
// graph, as ada2i_fast/ops/afw_layer.py, ada2i_fast/cpu/afw_layer.py and ada2i_fast/cuda/afw_layer.py have them.
#include "common.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>

#include <cmath>

#include "../cuda/ada2i_cuda.h"

namespace ada2i_torch {
namespace {

constexpr int64_t kModalities = 8, kRank = 32, kPer = 13, kParameters = 12;
Function tensor_ring_forward{"ada2i_tensor_ring_forward"}, tensor_ring_backward{"ada2i_tensor_ring_backward"};
PyObject* second_order;

struct Layer {
  int64_t m, rank, rows, dialogues, gated;
  int64_t widths[kModalities], ring[kModalities * (kModalities - 1)];
  double scale, beta, dropout, coefficient[kModalities];
  at::ScalarType dtype, parameters;
  bool with_loss;
  int32_t products;      // of the CUDA kernels an ada2i::DType, or -1 for the CPU's library

  bool on_cpu() const { return products < 0; }
};

at::ScalarType accumulator(at::ScalarType t) { return t == at::kDouble ? at::kDouble : at::kFloat; }

void call(const Function& function, const Layer& layer, const Tensor& offsets, const Tensor& seed, void* loss, void* const* tensors) {
  run(function, TensorRing{code(layer.dtype), at::get_num_threads(), layer.m, layer.rows, layer.dialogues, layer.rank, layer.gated,
                           code(layer.parameters), layer.scale, layer.beta, layer.dropout, layer.widths, layer.ring,
                           offsets.const_data_ptr<int64_t>(), address(seed), loss ? layer.coefficient : nullptr, loss, tensors});
}

// Where in the state each modality's projections, means, attentions and signs begin, kind by kind; returns where it ends. In bytes. On a CPU a
// bit for each of them lies behind the signs, of rows in multiples of 64: what dropout has kept.
int64_t places(const Layer& layer, int64_t* at) {
  const int64_t precise = c10::elementSize(accumulator(layer.dtype)), size = c10::elementSize(layer.dtype);
  const int64_t aligned = layer.on_cpu() ? 64 : 512;
  int64_t end = 0;
  for (int kind = 0; kind < 4; ++kind)
    for (int64_t j = 0; j < layer.m; ++j) {
      *at++ = end;
      const int64_t bytes[] = {4 * layer.rank * layer.rows * (layer.on_cpu() ? precise : size), layer.dialogues * layer.rank * layer.rank * precise,
                               layer.rows * layer.widths[j] * size,
                               layer.rows * (layer.widths[j] + (layer.on_cpu() ? (layer.widths[j] + 63) / 64 * 8 : 0))};
      end += (bytes[kind] + aligned - 1) / aligned * aligned;
    }
  return end;
}

// Where each of the first `count` parameters begins in a tensor that holds one after the other, and after them where it ends. In elements.
void parameter_starts(const Layer& layer, const variable_list& tensors, int64_t count, int64_t* starts) {
  *starts = 0;
  for (int64_t i = 0; i < count; ++i) starts[i + 1] = starts[i] + tensors[layer.m + i].numel();
}

// g_out, zeros where there is none.
variable_list given_gradients(const variable_list& grads, const variable_list& x, int64_t m) {
  variable_list given;
  given.reserve(m);
  for (int64_t j = 0; j < m; ++j) given.push_back(grads[j].defined() ? grads[j].contiguous() : at::zeros_like(x[j]));
  return given;
}

struct Pointers {
  void* list[kModalities * 40];
  int64_t count = 0;
  void add(const Tensor& t) { list[count++] = t.data_ptr(); }
  void add(void* p) { list[count++] = p; }
  void nulls(int64_t n) { while (n--) list[count++] = nullptr; }
};

// M outputs, and with a loss that; into `state` what backward takes from here. tensors: x and the parameters, 13M.
variable_list forward(const Layer& layer, const variable_list& tensors, const Tensor& offsets, const Tensor& seed, variable_list& state) {
  const int64_t m = layer.m;
  variable_list out;
  out.reserve(m + 1);
  for (int64_t j = 0; j < m; ++j) out.push_back(empty({layer.rows, layer.widths[j]}, layer.dtype));
  Pointers p;
  for (int64_t i = 0; i < 11 * m; ++i) p.add(tensors[i]);
  for (int64_t j = 0; j < m; ++j) p.add(out[j]);
  p.nulls(m);
  if (!layer.with_loss) {
    p.nulls(3 * m);
    call(tensor_ring_forward, layer, offsets, seed, nullptr, p.list);
    return out;
  }
  int64_t at[4 * kModalities];
  state = {empty({places(layer, at)}, at::kByte)};
  Tensor loss = empty({}, accumulator(layer.dtype));
  char* base = static_cast<char*>(state[0].data_ptr());
  for (int64_t i = 0; i < 3 * m; ++i) p.add(base + at[i]);
  for (int64_t i = 11 * m; i < kPer * m; ++i) p.add(tensors[i]);
  for (int64_t i = 3 * m; i < 4 * m; ++i) p.add(base + at[i]);
  call(tensor_ring_forward, layer, offsets, seed, loss.data_ptr(), p.list);
  out.push_back(std::move(loss));
  return out;
}

// A part of a tensor's memory, as a tensor.
Tensor part(const Tensor& flat, int64_t start, at::IntArrayRef sizes) {
  auto impl = c10::make_intrusive<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(flat.storage()), flat.key_set(), flat.dtype());
  impl->set_storage_offset(start);
  impl->set_sizes_contiguous(sizes);
  return Tensor(std::move(impl));
}

variable_list backward(const Layer& layer, const variable_list& tensors, const Tensor& offsets, const Tensor& seed, const variable_list& state,
                       const variable_list& grads) {
  const int64_t m = layer.m;
  const bool loss = grads[m].defined();
  variable_list found;
  found.reserve(kPer * m);
  for (int64_t j = 0; j < m; ++j) found.push_back(empty({layer.rows, layer.widths[j]}, layer.dtype));
  const variable_list given = given_gradients(grads, tensors, m);
  // The parameters' gradients lie in one tensor, in the parameters' order.
  int64_t starts[kParameters * kModalities + 1];
  const int64_t wanted = (loss ? kParameters : 10) * m;
  parameter_starts(layer, tensors, wanted, starts);
  Tensor flat = empty({starts[wanted]}, layer.parameters);
  char* to = static_cast<char*>(flat.data_ptr());
  const int64_t size = c10::elementSize(layer.parameters);
  int64_t at[4 * kModalities];
  places(layer, at);
  char* base = static_cast<char*>(state[0].data_ptr());
  Pointers p;
  for (int64_t i = 0; i < 5 * m; ++i) p.add(tensors[i]);
  for (int64_t i = 9 * m; i < 10 * m; ++i) p.add(tensors[i]);
  for (int64_t i = 0; i < 3 * m; ++i) p.add(base + at[i]);
  for (int64_t j = 0; j < m; ++j) p.add(given[j]);
  p.nulls(m);
  for (int64_t j = 0; j < m; ++j) p.add(found[j]);
  for (int64_t i = 0; i < 8 * m; i += 4) p.add(to + starts[i] * size);
  for (int64_t i = 8 * m; i < 10 * m; ++i) p.add(to + starts[i] * size);
  Tensor grad_loss;
  if (loss) {
    grad_loss = grads[m].contiguous();
    for (int64_t i = 11 * m; i < 12 * m; ++i) p.add(tensors[i]);
    for (int64_t i = 3 * m; i < 4 * m; ++i) p.add(base + at[i]);
    for (int64_t i = 10 * m; i < 12 * m; ++i) p.add(to + starts[i] * size);
  }
  call(tensor_ring_backward, layer, offsets, seed, loss ? grad_loss.data_ptr() : nullptr, p.list);
  for (int64_t i = 0; i < wanted; ++i) found.push_back(part(flat, starts[i], tensors[m + i].sizes()));
  found.resize(kPer * m);
  return found;
}

// ---------------------------------------------------------------------------------------------------------------- on a GPU

// Kernels of libada2i_cuda behind one function, and how many bytes they want for themselves.
struct Kernels {
  const char* name;
  int (*call)(const void* args, int64_t size, void* stream) = nullptr;
  int64_t (*scratch)(const void* args, int64_t size) = nullptr;
};
Kernels ring_forward{"ada2i_cuda_tensor_ring_forward"}, ring_backward{"ada2i_cuda_tensor_ring_backward"};
Kernels mapping_forward{"ada2i_cuda_attention_mapping_forward"}, mapping_backward{"ada2i_cuda_attention_mapping_backward"};
const char* (*error_string)(int);

Tensor empty_beside(const Tensor& like, at::IntArrayRef sizes, at::ScalarType dtype) { return at::empty(sizes, like.options().dtype(dtype)); }

// Enqueues on the current stream; the scratch memory is given away again in stream order.
template <class Arguments> void enqueue(const Kernels& kernels, Arguments& args, const Tensor& like) {
  RECORD_USER_SCOPE(kernels.name);
  const int64_t bytes = kernels.scratch(&args, sizeof args);
  TORCH_CHECK(bytes >= 0, kernels.name, ": arguments out of the kernels' range, or libada2i_cuda.so was built from other sources");
  const Tensor scratch = empty_beside(like, {bytes}, at::kByte);
  args.scratch = scratch.data_ptr();
  const c10::Device device = like.device();
  void* stream = device.is_cpu() ? nullptr : c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();   // CPU: the tests' shim
  const int error = kernels.call(&args, sizeof args, stream);
  TORCH_CHECK(!error, kernels.name, ": ", error_string(error));
}

// The parameters as the kernels take them, in the dtype of x. What they alone see lies in one tensor: the projections, of which each
// modality's four are one stack there; all of them where they have to be cast.
struct Parameters {
  const variable_list& tensors;
  int64_t m, joined, size, starts[kParameters * kModalities + 1];
  char* base;

  Parameters(const Layer& layer, const variable_list& all, Tensor& flat)
      : tensors(all), m(layer.m), joined((layer.parameters == layer.dtype ? 8 : kParameters) * m), size(c10::elementSize(layer.dtype)) {
    parameter_starts(layer, all, joined, starts);
    if (!flat.defined()) {
      variable_list flattened;
      flattened.reserve(joined);
      for (int64_t i = m; i < m + joined; ++i) flattened.push_back(part(all[i], all[i].storage_offset(), {all[i].numel()}));
      flat = at::cat(flattened).to(layer.dtype);
    }
    base = static_cast<char*>(flat.data_ptr());
  }

  // The number of the first parameter of a kind and a modality: weights and biases of projections, of the map, of Phi.
  static int64_t number(int64_t m, int64_t kind, int64_t j) { return kind < 2 ? 4 * (kind * m + j) : (6 + kind) * m + j; }
  void* at(int64_t kind, int64_t j) const {
    const int64_t i = number(m, kind, j);
    return i < joined ? base + starts[i] * size : tensors[m + i].data_ptr();
  }
};

// All but results and gradients, of both directions.
ada2i::TensorRing ring_arguments(const Layer& layer, const variable_list& tensors, const Tensor& offsets, const Tensor& seed,
                                 const Parameters& parameters, char* state, const int64_t* at) {
  const int64_t m = layer.m;
  ada2i::TensorRing a{};
  a.dtype = layer.products;
  a.count = int32_t(m);
  a.rank = int32_t(layer.rank);
  a.gated_target = layer.gated && layer.with_loss;
  a.rows = layer.rows;
  a.dialogues = layer.dialogues;
  a.scale = float(layer.scale);
  a.beta = float(layer.beta);
  a.keep_scale = float(1.0 / (1.0 - layer.dropout));
  a.threshold = uint32_t(std::min(std::nearbyint(layer.dropout * 0x1p32), double(0xffffffff)));
  a.offsets = offsets.const_data_ptr<int64_t>();
  a.seed = address(seed);
  for (int64_t j = 0; j < m; ++j) {
    for (int64_t l = 0; l < m - 1; ++l) a.ring[j][l] = int32_t(layer.ring[j * (m - 1) + l]);
    a.width[j] = layer.widths[j];
    a.x[j] = tensors[j].data_ptr();
    a.proj_weight[j] = parameters.at(0, j);
    a.proj_bias[j] = parameters.at(1, j);
    a.map_weight[j] = parameters.at(2, j);
    a.map_bias[j] = parameters.at(3, j);
    a.proj[j] = state + at[j];
    a.average[j] = reinterpret_cast<float*>(state + at[m + j]);
    a.attention[j] = state + at[2 * m + j];
  }
  return a;
}

ada2i::AttentionMapping mapping_arguments(const Layer& layer, const variable_list& tensors, const Parameters& parameters, char* state,
                                          const int64_t* at) {
  ada2i::AttentionMapping a{};
  a.dtype = layer.products;
  a.count = int32_t(layer.m);
  a.rows = layer.rows;
  for (int64_t j = 0; j < layer.m; ++j) {
    a.coefficient[j] = float(layer.coefficient[j]);
    a.width[j] = layer.widths[j];
    a.x[j] = tensors[j].data_ptr();
    a.weight[j] = parameters.at(4, j);
    a.bias[j] = parameters.at(5, j);
    a.sign[j] = reinterpret_cast<int8_t*>(state + at[3 * layer.m + j]);
  }
  return a;
}

// Where each modality's rows begin in a tensor that holds what is like x, and where it ends; in elements, aligned as torch aligns tensors.
int64_t row_starts(const Layer& layer, int64_t* at) {
  int64_t end = 0;
  for (int64_t j = 0; j < layer.m; ++j) {
    at[j] = end;
    end += (layer.rows * layer.widths[j] + 255) / 256 * 256;
  }
  return end;
}

variable_list forward_on_device(const Layer& layer, const variable_list& tensors, const Tensor& offsets, const Tensor& seed, variable_list& state) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::DeviceGuard guard(tensors[0].device());
  const int64_t m = layer.m, size = c10::elementSize(layer.dtype);
  Tensor flat;
  const Parameters parameters(layer, tensors, flat);
  int64_t at[4 * kModalities], rows_at[kModalities];
  Tensor kept = empty_beside(tensors[0], {places(layer, at)}, at::kByte), target;
  char* base = static_cast<char*>(kept.data_ptr());
  variable_list out;
  out.reserve(m + 1);
  auto ring = ring_arguments(layer, tensors, offsets, seed, parameters, base, at);
  if (ring.gated_target) target = empty_beside(tensors[0], {row_starts(layer, rows_at)}, layer.dtype);
  for (int64_t j = 0; j < m; ++j) {
    out.push_back(empty_beside(tensors[0], {layer.rows, layer.widths[j]}, layer.dtype));
    ring.out[j] = out[j].data_ptr();
    if (ring.gated_target) ring.target[j] = static_cast<char*>(target.data_ptr()) + rows_at[j] * size;
  }
  enqueue(ring_forward, ring, tensors[0]);
  if (!layer.with_loss) return out;
  Tensor loss = empty_beside(tensors[0], {}, at::kFloat);
  auto mapping = mapping_arguments(layer, tensors, parameters, base, at);
  for (int64_t j = 0; j < m; ++j) mapping.target[j] = ring.gated_target ? ring.target[j] : ring.attention[j];
  mapping.loss = loss.data_ptr<float>();
  enqueue(mapping_forward, mapping, tensors[0]);
  out.push_back(std::move(loss));
  state = {std::move(flat), std::move(kept)};
  return out;
}

variable_list backward_on_device(const Layer& layer, const variable_list& tensors, const Tensor& offsets, const Tensor& seed,
                                 const variable_list& state, const variable_list& grads) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::DeviceGuard guard(tensors[0].device());
  const int64_t m = layer.m, size = c10::elementSize(layer.dtype);
  Tensor flat = state[0];
  const Parameters parameters(layer, tensors, flat);
  int64_t at[4 * kModalities], rows_at[kModalities], starts[kParameters * kModalities + 1];
  places(layer, at);
  char* base = static_cast<char*>(state[1].data_ptr());
  const variable_list given = given_gradients(grads, tensors, m);
  const bool loss = grads[m].defined();
  const int64_t wanted = (loss ? kParameters : 10) * m, length = row_starts(layer, rows_at);
  parameter_starts(layer, tensors, wanted, starts);
  Tensor own = empty_beside(tensors[0], {starts[wanted]}, layer.dtype), grad_x = empty_beside(tensors[0], {length}, layer.dtype);
  const auto own_at = [&](int64_t kind, int64_t j) -> void* {
    return static_cast<char*>(own.data_ptr()) + starts[Parameters::number(m, kind, j)] * size;
  };
  const auto row_at = [&](const Tensor& t, int64_t j) -> void* { return static_cast<char*>(t.data_ptr()) + rows_at[j] * size; };
  auto ring = ring_arguments(layer, tensors, offsets, seed, parameters, base, at);
  for (int64_t j = 0; j < m; ++j) {
    ring.grad_out[j] = given[j].data_ptr();
    ring.grad_x[j] = row_at(grad_x, j);
    ring.grad_proj_weight[j] = own_at(0, j);
    ring.grad_proj_bias[j] = own_at(1, j);
    ring.grad_map_weight[j] = own_at(2, j);
    ring.grad_map_bias[j] = own_at(3, j);
  }
  if (loss) {
    const Tensor grad_loss = grads[m].contiguous(), grad_target = empty_beside(tensors[0], {length}, layer.dtype);
    const Tensor also_x = empty_beside(tensors[0], {length}, layer.dtype);
    auto mapping = mapping_arguments(layer, tensors, parameters, base, at);
    for (int64_t j = 0; j < m; ++j) {
      mapping.grad_x[j] = row_at(also_x, j);
      mapping.grad_target[j] = row_at(grad_target, j);
      mapping.grad_weight[j] = own_at(4, j);
      mapping.grad_bias[j] = own_at(5, j);
      ring.grad_target[j] = mapping.grad_target[j];
    }
    mapping.grad_loss = grad_loss.const_data_ptr<float>();
    enqueue(mapping_backward, mapping, tensors[0]);
    enqueue(ring_backward, ring, tensors[0]);
    grad_x.add_(also_x);
  } else {
    enqueue(ring_backward, ring, tensors[0]);
  }
  own = own.to(layer.parameters);
  variable_list found;
  found.reserve(kPer * m);
  for (int64_t j = 0; j < m; ++j) found.push_back(part(grad_x, rows_at[j], {layer.rows, layer.widths[j]}));
  for (int64_t i = 0; i < wanted; ++i) found.push_back(part(own, starts[i], tensors[m + i].sizes()));
  found.resize(kPer * m);
  return found;
}

// ---------------------------------------------------------------------------------------------------------------- the graph

py::tuple settings(const Layer& layer, const Tensor& seed) {
  py::list ring, coefficient;
  for (int64_t i = 0; i < layer.m * (layer.m - 1); ++i) ring.append(layer.ring[i]);
  for (int64_t j = 0; j < layer.m; ++j) coefficient.append(layer.coefficient[j]);
  return py::make_tuple(ring, layer.scale, layer.beta, layer.dropout, seed_or_none(seed), bool(layer.gated), coefficient);
}

struct AFWLayerBackward : SavingNode {      // saves x and the parameters, offsets, the seed, the state
  Layer layer;

  variable_list apply(variable_list&& grads) override {
    variable_list tensors = unpack();
    const auto end = tensors.begin() + kPer * layer.m;
    const Tensor offsets = end[0], seed = end[1];
    const variable_list state(end + 2, tensors.end());
    tensors.erase(end, tensors.end());
    if (!at::GradMode::is_enabled())
      return layer.on_cpu() ? backward(layer, tensors, offsets, seed, state, grads) : backward_on_device(layer, tensors, offsets, seed, state, grads);
    py::gil_scoped_acquire gil;
    return ask_python(second_order, tensors, offsets, settings(layer, seed), grads);
  }

  std::string name() const override { return "AFWLayerBackward"; }
};

// x and the parameters, 13M tensors, if all are `plain`, with these keys, and on one device.
bool take(const Items& x, const Items& kinds, c10::DispatchKeySet keys, variable_list& tensors) {
  constexpr int64_t counts[] = {4, 4, 1, 1, 1, 1};
  const int64_t m = x.size();
  if (m < 1 || m > kModalities || kinds.size() != 6) return false;
  tensors.reserve(kPer * m);
  for (int k = -1; k < 6; ++k) {
    const Items items = k < 0 ? x : Items(kinds[k]);
    if (k >= 0 && items.size() != counts[k] * m) return false;
    for (int64_t i = 0; i < items.size(); ++i) {
      if (!plain(items[i], keys)) return false;
      tensors.push_back(THPVariable_Unpack(items[i]));
      if (tensors.back().get_device() != tensors[0].get_device()) return false;
    }
  }
  return true;
}

// Sizes and dtypes into `layer`, if they fit each other and the library.
bool describe(const variable_list& tensors, const Tensor& offsets, Layer& layer) {
  const int64_t m = layer.m = tensors.size() / kPer;
  layer.dtype = tensors[0].scalar_type();
  layer.parameters = tensors[m].scalar_type();
  const bool half = layer.dtype == at::kBFloat16 || layer.dtype == at::kHalf;
  if (!half && layer.dtype != at::kFloat && !(layer.on_cpu() && layer.dtype == at::kDouble)) return false;
  if (layer.parameters != layer.dtype && !(half && layer.parameters == at::kFloat)) return false;
  if (tensors[0].dim() != 2 || tensors[5 * m].dim() != 1) return false;
  const int64_t rows = layer.rows = tensors[0].size(0), rank = layer.rank = tensors[5 * m].size(0);
  if (rank < 1 || rank > kRank) return false;
  for (int64_t j = 0; j < m; ++j) {
    const int64_t width = layer.widths[j] = tensors[j].dim() == 2 ? tensors[j].size(1) : 0;
    if (width < 1 || tensors[j].size(0) != rows || tensors[j].scalar_type() != layer.dtype) return false;
    const Tensor* own = &tensors[m];
    for (int64_t i = 0; i < 4; ++i)
      if (!has_shape(own[4 * j + i], rank, width) || !has_shape(own[4 * m + 4 * j + i], rank, 0)) return false;
    if (!has_shape(own[8 * m + j], width, rank * rank) || !has_shape(own[9 * m + j], width, 0) ||
        !has_shape(own[10 * m + j], width, width) || !has_shape(own[11 * m + j], width, 0))
      return false;
  }
  for (int64_t i = m; i < kPer * m; ++i)
    if (tensors[i].scalar_type() != layer.parameters) return false;

  if (offsets.scalar_type() != at::kLong || offsets.dim() != 1 || offsets.numel() < 1) return false;
  layer.dialogues = offsets.numel() - 1;
  if (!layer.on_cpu()) return true;                             // nobody looks at numbers that lie on a GPU
  const int64_t* at = offsets.const_data_ptr<int64_t>();
  return at[0] == 0 && at[layer.dialogues] == rows && std::is_sorted(at, at + layer.dialogues + 1);
}

bool read_ring(const Items& ring, Layer& layer) {
  if (ring.size() != layer.m) return false;
  int64_t* to = layer.ring;
  for (int64_t j = 0; j < layer.m; ++j) {
    const Items others(ring[j]);
    if (others.size() != layer.m - 1) return false;
    for (int64_t i = 0; i < layer.m - 1; ++i, ++to)
      if (!read(others[i], *to) || *to < 0 || *to >= layer.m) return false;
  }
  return true;
}

bool coefficients(py::handle reduction, Layer& layer) {
  const auto is = [&](const char* name) { return PyUnicode_Check(reduction.ptr()) && !PyUnicode_CompareWithASCIIString(reduction.ptr(), name); };
  const bool mean = is("mean");
  if (!mean && !is("sum")) return false;
  int64_t all = 0;
  for (int64_t j = 0; j < layer.m; ++j) all += layer.rows * layer.widths[j];
  for (int64_t j = 0; j < layer.m; ++j) {
    const int64_t n = mean ? all : layer.rows * layer.widths[j];
    layer.coefficient[j] = n ? 1.0 / n : 0.0;
  }
  return true;
}

// The keys of plain tensors where a tensor is that may be anything.
c10::DispatchKeySet plain_keys_beside(const Tensor& any) {
  if (any.is_cpu()) return plain_keys;
  if (!any.is_cuda()) return {};
  static const c10::DispatchKeySet keys = [&] {
    const c10::InferenceMode off(false);
    return at::empty({0}, at::TensorOptions(any.device())).key_set();
  }();
  return keys;
}

// The arguments of ops.afw_layer, and Layer's products; (M outputs, loss or None), or None.
py::object afw_layer(py::handle x_, py::handle offsets_, py::handle kinds, py::handle ring, py::handle scale, py::handle beta,
                     py::handle dropout, py::handle seed_, py::handle gated_target, py::handle reduction, bool with_loss, int32_t products) {
  Layer layer{};
  layer.products = products;
  variable_list tensors;
  const Items x(x_);
  if (x.size() < 1 || !is_tensor(x[0]) || !(layer.on_cpu() ? undisturbed() : unwatched())) return py::none();
  const auto keys = layer.on_cpu() ? plain_keys : plain_keys_beside(THPVariable_Unpack(x[0]));
  if (!take(x, Items(kinds), keys, tensors) || !plain(offsets_.ptr(), keys)) return py::none();
  const Tensor& offsets = THPVariable_Unpack(offsets_.ptr());
  if (offsets.get_device() != tensors[0].get_device()) return py::none();
  if (!describe(tensors, offsets, layer) || !read_ring(Items(ring), layer) || !coefficients(reduction, layer) ||
      !read(scale, layer.scale) || !read(beta, layer.beta) || !read(dropout, layer.dropout) || !(layer.dropout >= 0 && layer.dropout < 1))
    return py::none();
  layer.gated = gated_target.ptr() == Py_True;
  if (!layer.gated && gated_target.ptr() != Py_False) return py::none();
  layer.with_loss = with_loss;
  const bool graph = wants_graph(tensors);
  if (graph && !with_loss) return py::none();
  Tensor seed;
  if (!read_seed(seed_, layer.dropout, tensors[0], seed)) return py::none();

  variable_list out, state;
  {
    py::gil_scoped_release release;
    out = layer.on_cpu() ? forward(layer, tensors, offsets, seed, state) : forward_on_device(layer, tensors, offsets, seed, state);
    if (graph) {
      auto pointer = make_node<AFWLayerBackward>(tensors);
      auto* node = static_cast<AFWLayerBackward*>(pointer.get());
      node->layer = layer;
      node->saved.reserve(tensors.size() + 4);
      node->save({tensors, {offsets, seed}, state});
      for (auto& t : out) torch::autograd::set_history(t, pointer);
    }
  }
  py::list outputs(layer.m);
  for (int64_t j = 0; j < layer.m; ++j) PyList_SET_ITEM(outputs.ptr(), j, THPVariable_Wrap(std::move(out[j])));
  return py::make_tuple(outputs, with_loss ? py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(out[layer.m]))) : py::none());
}

}  // namespace

Brought bring_afw_layer(py::module& module) {
  module.def("afw_layer", torch::wrap_pybind_function(afw_layer));
  // address: of a function of libada2i_cuda, by its name.
  module.def("use_cuda", [](py::function address) {
    const auto at = [&](const std::string& name) { return py::cast<uintptr_t>(address(name)); };
    for (Kernels* kernels : {&ring_forward, &ring_backward, &mapping_forward, &mapping_backward}) {
      kernels->call = reinterpret_cast<decltype(kernels->call)>(at(kernels->name));
      kernels->scratch = reinterpret_cast<decltype(kernels->scratch)>(at(std::string(kernels->name) + "_scratch"));
    }
    error_string = reinterpret_cast<decltype(error_string)>(at("ada2i_cuda_error_string"));
  });
  return {{&tensor_ring_forward, &tensor_ring_backward}, {{"afw_layer", &second_order}}};
}

}  // namespace ada2i_torch
