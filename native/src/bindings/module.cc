// Registers the bound classes; holds no logic.
#include "bindings/bindings.h"

PYBIND11_MODULE(_native, module) {
  module.attr("__version__") = EDGERT_VERSION;
  edgert::bind_errors(module);
  edgert::bind_platform(module);
  edgert::bind_quant(module);
  edgert::bind_split(module);
  edgert::bind_bundle(module);
  edgert::bind_engine(module);
  edgert::bind_probe(module);
  edgert::bind_simulation(module);
  edgert::bind_control(module);
}
