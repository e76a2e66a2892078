// The module ada2i_torch, which ada2i_fast/node.py loads.
#include <c10/core/InferenceMode.h>

#include "common.h"

PYBIND11_MODULE(ada2i_torch, module) {
  module.attr("ABI_VERSION") = 4;
  static std::vector<ada2i_torch::Brought> brought;      // once a process: pybind keeps the module
  brought = {ada2i_torch::bring_afw_layer(module), ada2i_torch::bring_encoder_layers(module), ada2i_torch::bring_balanced_adam(module)};
  // address: of a function of libada2i_cpu, by its name. parameter: torch.nn.Parameter. callbacks: by name, what the files ask Python for.
  module.def("use", [](py::function address, py::object parameter, py::kwargs callbacks) {
    for (auto& [functions, asked] : brought) {
      for (auto* function : functions)
        function->call = reinterpret_cast<decltype(function->call)>(py::cast<uintptr_t>(address(function->name)));
      for (auto& [name, callback] : asked) *callback = py::object(callbacks[name]).release().ptr();
    }
    ada2i_torch::parameter_class = reinterpret_cast<PyTypeObject*>(parameter.release().ptr());
    const c10::InferenceMode off(false);           // whose tensors are others
    ada2i_torch::plain_keys = at::detail::empty_cpu({0}, at::kFloat).key_set();
  });
}
