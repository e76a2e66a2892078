// Transformer layers of an encoder on a CPU without Python between libada2i_cpu and torch, and the linear map behind them, as
// ada2i_fast/ops/encoder_layer.py and ada2i_fast/ops/linear.py have them, with the products by the libraries that the latter has found to be the
// fastest. A layer is two nodes of autograd's graph, to norm1 and from there: a node holds the gradients that it makes until it ends, and those
// of a large layer's weights are more than its activations.
#include "common.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <torch/csrc/autograd/graph_task.h>

#include <array>

namespace ada2i_torch {
namespace {

Function linear_forward{"ada2i_linear_forward"}, linear_input{"ada2i_linear_input"}, linear_backward{"ada2i_linear_backward"},
    relu_dropout_forward{"ada2i_relu_dropout_forward"}, relu_dropout_backward{"ada2i_relu_dropout_backward"},
    dropout_norm_forward{"ada2i_dropout_norm_forward"}, dropout_norm_backward{"ada2i_dropout_norm_backward"},
    attention_forward{"ada2i_dialogue_attention_forward"}, attention_backward{"ada2i_dialogue_attention_backward"};
PyObject *second_order_attention, *second_order_inner, *plan;

// Whose product it is, as ops.linear.planned says: torch's own, oneDNN's, this package's, or its of a float weight that it rounds to the 16 bits of x.
enum By { kTorch, kOneDNN, kNative, kRounds };
struct Product { int64_t forward, input, weight; };
enum { kQkv, kOut, kOne, kTwo, kLast, kProducts };

struct Stack {      // what the layers of an encoder have in common
  int64_t rows, width, inside, heads, outputs = 0;
  double p;
  at::ScalarType dtype;      // of the products
  std::array<Product, kProducts> by;
  std::vector<int64_t> starts;      // of dialogues, and where the last one ends
};

// Neither autograd nor autocast: what is to be rounded is rounded here.
struct Below {
  at::AutoDispatchBelowAutograd autograd;
  c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
};

// -------------------------------------------------------------------------------------------------------------------- products

Tensor onednn(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  // Private to torch, so without a C++ signature to hold on to; Python has tried it.
  static const c10::OperatorHandle op = c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "");
  torch::jit::Stack stack{x, weight, bias.defined() ? c10::IValue(bias) : c10::IValue(), "none", c10::List<std::optional<at::Scalar>>(), ""};
  op.callBoxed(stack);
  return std::move(stack.front()).toTensor();
}

void call_linear(const Function& function, const Tensor& x, int64_t inputs, int64_t outputs, void* const* tensors, bool relu = false, double p = 0,
                 const Tensor& seed = {}, int64_t stream = 0) {
  run(function, Linear{code(x.scalar_type()), at::get_num_threads(), x.size(0), inputs, outputs, relu, stream, p, p ? address(seed) : nullptr, tensors});
}

void* pointer(const Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; }

Tensor native(const Tensor& x, const Tensor& weight, const Tensor& bias, bool relu = false, double p = 0, const Tensor& seed = {}, int64_t stream = 0) {
  Tensor y = empty({x.size(0), weight.size(0)}, x.scalar_type());
  void* tensors[] = {pointer(x), pointer(weight), pointer(bias), pointer(y)};
  call_linear(linear_forward, x, weight.size(1), weight.size(0), tensors, relu, p, seed, stream);
  return y;
}

// x W^T + b; of 16 bits, x and, unless it `kRounds`, the weight are rounded already.
Tensor product(int64_t by, const Tensor& x, const Tensor& weight, const Tensor& bias = {}) {
  if (by >= kNative) return native(x, weight, bias);
  const Tensor rounded = bias.defined() ? bias.to(x.scalar_type()) : bias;
  return by == kOneDNN ? onednn(x, weight, rounded) : at::linear(x, weight, rounded);
}

// g W in the dtype of g; added to `into`, if there is one.
Tensor input_gradient(int64_t by, const Tensor& g, const Tensor& weight, const Tensor& into = {}) {
  Tensor found;
  if (by >= kNative) {
    const bool adds = into.defined() && g.scalar_type() == at::kFloat;
    found = adds ? into : empty({g.size(0), weight.size(1)}, g.scalar_type());
    void* tensors[] = {pointer(g), pointer(weight), adds ? pointer(into) : nullptr, pointer(found)};
    call_linear(linear_input, g, weight.size(1), weight.size(0), tensors);
    if (adds) return found;
  } else {
    found = by == kOneDNN ? onednn(g, weight.t(), {}) : at::mm(g, weight);
  }
  return into.defined() ? into.add_(found) : found;
}

// g^T x and the sum of g's rows, in float, each unless null.
void parameter_gradients(int64_t by, const Tensor& g, const Tensor& x, Tensor* weight, Tensor* bias) {
  if (weight && by == kNative) {
    *weight = empty({g.size(1), x.size(1)}, at::kFloat);
    if (bias) *bias = empty({g.size(1)}, at::kFloat);
    void* tensors[] = {pointer(g), pointer(x), pointer(*weight), bias ? pointer(*bias) : nullptr};
    call_linear(linear_backward, x, x.size(1), g.size(1), tensors);
    return;
  }
  if (weight) *weight = (by == kOneDNN ? onednn(g.t(), x.t(), {}) : at::mm(g.t(), x)).to(at::kFloat);
  if (bias) *bias = at::sum(g, 0, false, at::kFloat);
}

// ----------------------------------------------------------------------------------------------------------- the rest of a layer

void call_dropout(const Function& function, const Stack& s, const Tensor& x, const Tensor& seed, int64_t stream, double eps, void* const* tensors) {
  run(function, DropoutFused{code(x.scalar_type()), at::get_num_threads(), x.size(0), x.size(1), stream, s.p, eps, address(seed), tensors});
}

struct Norm { Tensor out, mean, rstd; };

Norm norm_forward(const Stack& s, const Tensor& x, const Tensor& bias, const Tensor& residual, const Tensor& weight, const Tensor& norm_bias, double eps,
                  const Tensor& seed, int64_t stream) {
  Norm found{empty({s.rows, s.width}, at::kFloat), empty({s.rows}, at::kFloat), empty({s.rows}, at::kFloat)};
  void* tensors[] = {pointer(x), pointer(bias), pointer(residual), pointer(weight), pointer(norm_bias), pointer(found.out), pointer(found.mean),
                     pointer(found.rstd)};
  call_dropout(dropout_norm_forward, s, x, seed, stream, eps, tensors);
  return found;
}

struct NormGradients { Tensor x, bias, residual, weight, norm_bias; };

NormGradients norm_backward(const Stack& s, const Tensor& g, const Tensor& x, const Tensor& bias, const Tensor& residual, const Tensor& weight,
                            const Tensor& mean, const Tensor& rstd, const Tensor& seed, int64_t stream) {
  const auto row = [&] { return empty({s.width}, at::kFloat); };
  NormGradients found{empty({s.rows, s.width}, x.scalar_type()), row(), empty({s.rows, s.width}, at::kFloat), row(), row()};
  void* tensors[] = {pointer(x), pointer(bias), pointer(residual), pointer(weight), pointer(mean), pointer(rstd), pointer(g), pointer(found.x),
                     pointer(found.bias), pointer(found.residual), pointer(found.weight), pointer(found.norm_bias)};
  call_dropout(dropout_norm_backward, s, x, seed, stream, 0, tensors);
  return found;
}

void call_attention(const Function& function, const Stack& s, const Tensor& qkv, const Tensor& seed, int64_t stream, void* const* tensors) {
  const double scale = std::pow(double(s.width / s.heads), -0.5);      // with the bits of Python's **
  run(function, DialogueAttention{code(qkv.scalar_type()), at::get_num_threads(), s.heads, s.width, int64_t(s.starts.size()) - 1, stream, scale,
                                  s.p, s.starts.data(), address(seed), tensors});
}

// --------------------------------------------------------------------------------------------------------------------- the halves
//
//   y = norm1(x + drop(t W_o^T + b_o)),   t = attention(x W_qkv^T + b_qkv)
//   z = norm2(y + drop(t W_2^T + b_2)),   t = drop(max(0, y W_1^T + b_1))
//
// are one function of x or y, but for t: an Attention or an Inner.

enum Parameter { kWeight, kBias, kOutWeight, kOutBias, kNormWeight, kNormBias, kParameters };
// What is kept for backward beside x and the parameters. Rounded copies are undefined where nothing is rounded, or the library does it; kSums and
// kLogsum are of attention alone.
enum Place { kRoundedWeight, kRoundedOutWeight, kRoundedX, kT, kOuter, kMean, kRstd, kSums, kLogsum, kPlaces };

struct Half {
  std::shared_ptr<const Stack> stack;
  int64_t stream, outer_stream;      // of the dropout in t, and of the one behind it
  double eps;
};

// t as the product of `by` takes it, if that is another than t.
Tensor rounded(const Stack& s, const Tensor& t, int64_t by = kTorch) { return s.dtype == at::kFloat || by == kRounds ? Tensor() : t.to(s.dtype); }

const Tensor& either(const Tensor& rounded, const Tensor& t) { return rounded.defined() ? rounded : t; }

struct State : std::array<Tensor, kPlaces> {
  bool keeps = true;      // whether somebody takes it: else what has served is free at once

  void forget(std::initializer_list<Place> places) {
    for (Place place : places) (*this)[place] = Tensor();
  }
  void served(std::initializer_list<Place> places) {
    if (!keeps) forget(places);
  }
  const Tensor& keep(Place place, Tensor rounded, const Tensor& t) { return either((*this)[place] = std::move(rounded), t); }
};

using Needs = std::array<bool, 1 + kParameters>;      // of x and the parameters

struct Attention {
  static constexpr const char* name = "EncoderAttentionBackward";
  static constexpr int first = kQkv, second = kOut;
  static PyObject* second_order() { return second_order_attention; }

  static void forward(const Half& half, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& seed, State& k) {
    const Stack& s = *half.stack;
    k[kSums] = product(s.by[kQkv].forward, x, weight, bias);
    k[kT] = empty({s.rows, s.width}, s.dtype);
    k[kLogsum] = empty({s.rows, s.heads, 2}, at::kFloat);
    void* tensors[] = {pointer(k[kSums]), pointer(k[kT]), pointer(k[kLogsum])};
    call_attention(attention_forward, s, k[kSums], seed, half.stream, tensors);
    k.served({kSums, kLogsum});
  }

  // The gradient of the first product's result, and, if that comes with it, the one of its bias.
  static Tensor backward(const Half& half, Tensor g, const Tensor& seed, State& k, Tensor*) {
    const Stack& s = *half.stack;
    Tensor found = empty({s.rows, 3 * s.width}, s.dtype);
    void* tensors[] = {pointer(k[kSums]), pointer(k[kT]), pointer(k[kLogsum]), pointer(g), pointer(found)};
    call_attention(attention_backward, s, found, seed, half.stream, tensors);
    k.forget({kSums, kT, kLogsum});
    return found;
  }
};

struct Inner {
  static constexpr const char* name = "EncoderInnerBackward";
  static constexpr int first = kOne, second = kTwo;
  static PyObject* second_order() { return second_order_inner; }

  static void forward(const Half& half, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& seed, State& k) {
    const Stack& s = *half.stack;
    if (s.by[kOne].forward >= kNative) {
      k[kT] = native(x, weight, bias, true, s.p, seed, half.stream);
      return;
    }
    const Tensor sums = product(s.by[kOne].forward, x, weight);
    k[kT] = empty({s.rows, s.inside}, s.dtype);
    void* tensors[] = {pointer(sums), pointer(bias), pointer(k[kT])};
    call_dropout(relu_dropout_forward, s, sums, seed, half.stream, 0, tensors);
  }

  static Tensor backward(const Half& half, Tensor g, const Tensor& seed, State& k, Tensor* bias) {
    const Stack& s = *half.stack;
    Tensor found = empty({s.rows, s.inside}, s.dtype);
    *bias = empty({s.inside}, at::kFloat);
    void* tensors[] = {pointer(g), pointer(k[kT]), pointer(found), pointer(*bias)};
    call_dropout(relu_dropout_backward, s, found, seed, 0, 0, tensors);
    k.forget({kT});
    return found;
  }
};

template <class Part> Tensor forward(const Half& half, const Tensor& x, const Tensor* p, const Tensor& seed, State& k) {
  const Stack& s = *half.stack;
  const int64_t first = s.by[Part::first].forward, second = s.by[Part::second].forward;
  const Tensor& rounded_x = k.keep(kRoundedX, rounded(s, x), x);
  Part::forward(half, rounded_x, k.keep(kRoundedWeight, rounded(s, p[kWeight], first), p[kWeight]), p[kBias], seed, k);
  k.served({kRoundedX, kRoundedWeight});
  k[kOuter] = product(second, k[kT], k.keep(kRoundedOutWeight, rounded(s, p[kOutWeight], second), p[kOutWeight]));
  k.served({kT, kRoundedOutWeight});
  Norm norm = norm_forward(s, k[kOuter], p[kOutBias], x, p[kNormWeight], p[kNormBias], half.eps, seed, half.outer_stream);
  k[kMean] = norm.mean, k[kRstd] = norm.rstd;
  return norm.out;
}

// Gradients of x and the parameters, none from where on no gradient is needed. Whatever has served is given away.
template <class Part>
variable_list backward(const Half& half, Tensor grad, const Needs& needs, const Tensor& x, const Tensor* p, const Tensor& seed, State& k) {
  const Stack& s = *half.stack;
  const Product &first = s.by[Part::first], &second = s.by[Part::second];
  const bool needs_x = needs[0], *needed = &needs[1];
  variable_list found(1 + kParameters);
  Tensor* of = &found[1];
  NormGradients norm = norm_backward(s, grad, k[kOuter], p[kOutBias], x, p[kNormWeight], k[kMean], k[kRstd], seed, half.outer_stream);
  k.forget({kOuter, kMean, kRstd});
  grad = Tensor();
  of[kOutBias] = norm.bias, of[kNormWeight] = norm.weight, of[kNormBias] = norm.norm_bias;
  Tensor g;
  if (needs_x || needed[kWeight] || needed[kBias]) g = input_gradient(second.input, norm.x, either(k[kRoundedOutWeight], p[kOutWeight]));
  if (needed[kOutWeight]) parameter_gradients(second.weight, norm.x, k[kT], &of[kOutWeight], nullptr);
  if (!g.defined()) return found;
  k.forget({kRoundedOutWeight});
  norm.x = Tensor();

  const Tensor g_sums = Part::backward(half, std::move(g), seed, k, &of[kBias]);
  Tensor* bias = needed[kBias] && !of[kBias].defined() ? &of[kBias] : nullptr;
  if (needs_x) found[0] = input_gradient(first.input, g_sums, either(k[kRoundedWeight], p[kWeight]), norm.residual);
  parameter_gradients(first.weight, g_sums, either(k[kRoundedX], x), needed[kWeight] ? &of[kWeight] : nullptr, bias);
  return found;
}

// ----------------------------------------------------------------------------------------------------------------------- nodes

template <class Part> struct HalfBackward : SavingNode {      // saves x and the parameters, the seed, and the state
  Half half;

  variable_list apply(variable_list&& grads) override {
    if (!grads[0].defined()) return variable_list(1 + kParameters);
    variable_list tensors = unpack();
    const Tensor seed = tensors[1 + kParameters];
    const Stack& s = *half.stack;
    if (at::GradMode::is_enabled()) {
      tensors.resize(1 + kParameters);
      py::gil_scoped_acquire gil;
      py::list lengths;
      for (size_t i = 1; i < s.starts.size(); ++i) lengths.append(s.starts[i] - s.starts[i - 1]);
      return ask_python(Part::second_order(), tensors, lengths, s.heads, s.p, half.eps, seed_or_none(seed), half.stream, s.dtype, grads[0]);
    }
    if (!torch::autograd::get_current_graph_task_keep_graph()) release_variables();      // gradients take as much as what is saved
    State kept;
    std::move(tensors.begin() + 2 + kParameters, tensors.end(), kept.begin());
    tensors.resize(1 + kParameters);
    Needs needs;
    for (size_t i = 0; i < needs.size(); ++i) needs[i] = task_should_compute_output(i);
    const Below below;
    Tensor grad = std::move(grads[0]).contiguous();
    grads.clear();
    return backward<Part>(half, std::move(grad), needs, tensors[0], &tensors[1], seed, kept);
  }

  std::string name() const override { return Part::name; }
};

template <class Part> Tensor apply_half(const Half& half, const Tensor& x, const Tensor* parameters, const Tensor& seed) {
  variable_list inputs{x};
  inputs.insert(inputs.end(), parameters, parameters + kParameters);
  State kept;
  kept.keeps = wants_graph(inputs);
  Tensor z;
  {
    const Below below;
    z = forward<Part>(half, x, parameters, seed, kept);
  }
  if (kept.keeps) {
    auto pointer = make_node<HalfBackward<Part>>(inputs);
    auto* node = static_cast<HalfBackward<Part>*>(pointer.get());
    node->half = half;
    node->saved.reserve(inputs.size() + 1 + kept.size());
    node->save({inputs, {seed}, kept});
    torch::autograd::set_history(z, pointer);
  }
  return z;
}

struct EncoderOutBackward : SavingNode {      // saves x, the weight, and both rounded
  Product by;

  variable_list apply(variable_list&& grads) override {
    variable_list found(3);
    if (!grads[0].defined()) return found;
    const variable_list tensors = unpack();
    const Tensor &x = tensors[0], &weight = tensors[1], &g = grads[0];
    const bool needs_x = task_should_compute_output(0), needs_weight = task_should_compute_output(1), needs_bias = task_should_compute_output(2);
    if (at::GradMode::is_enabled()) {
      const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
      if (needs_x) found[0] = at::matmul(g, weight.to(g.scalar_type())).to(at::kFloat);
      if (needs_weight) found[1] = at::matmul(g.t(), x.to(g.scalar_type())).to(at::kFloat);
      if (needs_bias) found[2] = at::sum(g, 0, false, at::kFloat);
      return found;
    }
    const Below below;
    const Tensor grad = g.contiguous();
    if (needs_x) found[0] = input_gradient(by.input, grad, either(tensors[3], weight)).to(at::kFloat);
    parameter_gradients(by.weight, grad, either(tensors[2], x), needs_weight ? &found[1] : nullptr, needs_bias ? &found[2] : nullptr);
    return found;
  }

  std::string name() const override { return "EncoderOutBackward"; }
};

Tensor apply_out(const Stack& s, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const variable_list inputs{x, weight, bias};
  Tensor rounded_x, rounded_weight, y;
  const Product& by = s.by[kLast];
  {
    const Below below;
    rounded_x = rounded(s, x), rounded_weight = rounded(s, weight, by.forward);
    y = product(by.forward, either(rounded_x, x), either(rounded_weight, weight), bias);
  }
  if (wants_graph(inputs)) {
    auto pointer = make_node<EncoderOutBackward>(inputs);
    auto* node = static_cast<EncoderOutBackward*>(pointer.get());
    node->by = by;
    node->saved.reserve(4);
    node->save({{x, weight, rounded_x, rounded_weight}});
    torch::autograd::set_history(y, pointer);
  }
  return y;
}

// ------------------------------------------------------------------------------------------------------------- what Python gives

// Float tensors, if they are `plain`.
bool take(const Items& items, int64_t count, variable_list& tensors) {
  if (items.size() != count) return false;
  for (int64_t i = 0; i < count; ++i) {
    if (!plain(items[i]) || THPVariable_Unpack(items[i]).scalar_type() != at::kFloat) return false;
    tensors.push_back(THPVariable_Unpack(items[i]));
  }
  return true;
}

bool fits(const Tensor* attention, const Tensor* inner, int64_t width, int64_t inside) {
  for (const Tensor* half : {attention, inner})
    for (Parameter which : {kOutBias, kNormWeight, kNormBias})
      if (!has_shape(half[which], width)) return false;
  return has_shape(attention[kWeight], 3 * width, width) && has_shape(attention[kBias], 3 * width) && has_shape(attention[kOutWeight], width, width) &&
         has_shape(inner[kWeight], inside, width) && has_shape(inner[kBias], inside) && has_shape(inner[kOutWeight], width, inside);
}

bool read_lengths(const Items& lengths, Stack& s) {
  if (lengths.size() < 0) return false;
  s.starts.reserve(lengths.size() + 1);
  s.starts.push_back(0);
  for (int64_t i = 0, n; i < lengths.size(); ++i) {
    if (!read(lengths[i], n) || n < 0 || n > s.rows - s.starts.back()) return false;
    s.starts.push_back(s.starts.back() + n);
  }
  return s.starts.back() == s.rows;
}

// By whom the products are done; false where that has still to be measured.
bool read_plan(bool graph, Stack& s) {
  const py::object found = py::reinterpret_borrow<py::object>(plan)(s.dtype, s.rows, s.width, s.inside, s.outputs, graph);
  const Items codes(found);
  int64_t* to = &s.by[0].forward;
  static_assert(sizeof s.by == 3 * kProducts * sizeof(int64_t));
  if (codes.size() != 3 * (s.outputs ? kProducts : kProducts - 1)) return false;
  for (int64_t i = 0; i < codes.size(); ++i)
    if (!read(codes[i], to[i])) return false;
  return true;
}

// The arguments of ops.encoder_layers; its result, or None.
py::object encoder_layers(py::handle x_, py::handle lengths, py::handle layers_, py::handle heads, py::handle p, py::handle eps_, py::handle seed_,
                          py::handle stream_, py::handle out_) {
  const Items layers(layers_), eps(eps_);
  auto stack = std::make_shared<Stack>();
  Stack& s = *stack;
  variable_list tensors;
  if (!undisturbed() || layers.size() < 1 || !plain(x_.ptr())) return py::none();
  Tensor x = THPVariable_Unpack(x_.ptr());
  if (x.scalar_type() != at::kFloat || x.dim() != 2 || x.numel() == 0) return py::none();
  s.rows = x.size(0), s.width = x.size(1);
  tensors.reserve(2 * layers.size() * kParameters + 2);
  for (int64_t i = 0; i < layers.size(); ++i) {
    if (!take(Items(layers[i]), 2 * kParameters, tensors)) return py::none();
    const Tensor *attention = &tensors[2 * i * kParameters], *inner = attention + kParameters;
    if (i == 0) s.inside = inner[kBias].dim() == 1 ? inner[kBias].size(0) : 0;
    if (s.inside < 1 || !fits(attention, inner, s.width, s.inside)) return py::none();
  }
  if (!out_.is_none()) {
    if (!take(Items(out_), 2, tensors)) return py::none();
    const Tensor &weight = tensors.end()[-2], &bias = tensors.end()[-1];
    s.outputs = bias.dim() == 1 ? bias.size(0) : 0;
    if (s.outputs < 1 || !has_shape(weight, s.outputs, s.width)) return py::none();
  }
  int64_t stream;
  if (!read_lengths(Items(lengths), s) || !read(heads, s.heads) || s.heads < 1 || s.width % s.heads || !read(p, s.p) || !(s.p >= 0 && s.p < 1) ||
      !read(stream_, stream) || (!eps_.is_none() && eps.size() != layers.size()))
    return py::none();
  s.dtype = at::autocast::is_autocast_enabled(at::kCPU) ? at::autocast::get_autocast_dtype(at::kCPU) : at::kFloat;
  if (s.dtype != at::kFloat && s.dtype != at::kBFloat16 && s.dtype != at::kHalf) return py::none();
  std::vector<Half> halves;
  for (int64_t i = 0; i < layers.size(); ++i) {
    double norm[] = {1e-5, 1e-5};
    if (!eps_.is_none()) {
      const Items pair(eps[i]);
      if (pair.size() != 2 || !read(pair[0], norm[0]) || !read(pair[1], norm[1])) return py::none();
    }
    const int64_t at = stream + i * (s.heads + 3) + s.heads;
    halves.push_back({stack, at - s.heads, at, norm[0]});
    halves.push_back({stack, at + 1, at + 2, norm[1]});
  }
  Tensor seed;
  if (!read_plan(at::GradMode::is_enabled(), s) || !read_seed(seed_, s.p, x, seed)) return py::none();
  {
    py::gil_scoped_release release;
    for (size_t i = 0; i < halves.size(); i += 2) {
      x = apply_half<Attention>(halves[i], x, &tensors[i * kParameters], seed);
      x = apply_half<Inner>(halves[i + 1], x, &tensors[(i + 1) * kParameters], seed);
    }
    if (s.outputs) x = apply_out(s, x, tensors.end()[-2], tensors.end()[-1]);
  }
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(x)));
}

}  // namespace

Brought bring_encoder_layers(py::module& module) {
  module.def("encoder_layers", torch::wrap_pybind_function(encoder_layers));
  return {{&linear_forward, &linear_input, &linear_backward, &relu_dropout_forward, &relu_dropout_backward, &dropout_norm_forward,
           &dropout_norm_backward, &attention_forward, &attention_backward},
          {{"encoder_attention", &second_order_attention}, {"encoder_inner", &second_order_inner}, {"plan", &plan}}};
}

}  // namespace ada2i_torch
