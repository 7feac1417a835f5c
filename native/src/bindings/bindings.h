// What each file of this folder registers.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "storage/reader.h"

namespace edgert {

void bind_errors(pybind11::module_& module);
void bind_quant(pybind11::module_& module);
void bind_split(pybind11::module_& module);
void bind_platform(pybind11::module_& module);
void bind_bundle(pybind11::module_& module);
void bind_engine(pybind11::module_& module);
void bind_adapter(pybind11::module_& module);
void bind_model(pybind11::module_& module);
void bind_simulation(pybind11::module_& module);
void bind_control(pybind11::module_& module);
void bind_probe(pybind11::module_& module);

// As the knob names it; auto is what costs least where nothing was measured.
IoBackend io_backend(const std::string& word);

}  // namespace edgert
