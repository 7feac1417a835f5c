// Controller, Plant.
#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "control/controller.h"
#include "control/plants.h"
#include "platform/error.h"

namespace py = pybind11;

namespace edgert {
namespace {

// Fields from keyword arguments; a name that is none of them is refused.
class Fields {
 public:
  Fields(py::dict given, const char* what) : given_(std::move(given)), what_(what) {}
  template <typename T>
  Fields& field(const char* name, T& into) {
    known_ += (known_.empty() ? "" : ", ") + std::string(name);
    if (!given_.contains(name)) return *this;
    try {
      into = given_[name].cast<T>();
    } catch (const py::cast_error&) {
      throw Error(ErrorKind::invalid_argument,
                  what_ + "." + name + ": found " + py::str(given_[name]).cast<std::string>());
    }
    ++used_;
    return *this;
  }
  void done() const {
    if (used_ == given_.size()) return;
    for (const auto& item : given_) {
      const auto name = item.first.cast<std::string>();
      if ((", " + known_ + ",").find(", " + name + ",") == std::string::npos)
        throw Error(ErrorKind::invalid_argument, what_ + ": has no " + name + ", only " + known_);
    }
  }

 private:
  py::dict given_;
  std::string what_;
  std::string known_;
  std::size_t used_ = 0;
};

Actuator actuator(const py::dict& given) {
  Actuator out;
  Fields(given, "actuator")
      .field("name", out.name)
      .field("minimum", out.minimum)
      .field("maximum", out.maximum)
      .field("start", out.start)
      .field("step", out.step)
      .field("stage", out.stage)
      .done();
  return out;
}

ControlSettings control_settings(const py::dict& given) {
  ControlSettings out;
  py::dict fast;
  std::vector<py::dict> slow;
  Fields(given, "settings")
      .field("low", out.low)
      .field("high", out.high)
      .field("fast", fast)
      .field("slow", slow)
      .field("patience", out.patience)
      .field("blanking", out.blanking)
      .field("dwell", out.dwell)
      .field("relief", out.relief)
      .field("slow_gain", out.slow_gain)
      .field("hysteresis", out.hysteresis)
      .field("lead", out.lead)
      .field("max_age", out.max_age)
      .field("drives", out.drives)
      .field("increase", out.increase)
      .field("decrease", out.decrease)
      .field("proportional", out.proportional)
      .field("integral", out.integral)
      .done();
  out.fast = actuator(fast);
  for (const py::dict& each : slow) out.slow.push_back(actuator(each));
  return out;
}

PlantSettings plant_settings(const py::dict& given) {
  PlantSettings out;
  Fields(given, "plant")
      .field("curve_kind", out.curve_kind)
      .field("offset", out.offset)
      .field("gain", out.gain)
      .field("decade", out.decade)
      .field("curve", out.curve)
      .field("fast_weight", out.fast_weight)
      .field("fast_centre", out.fast_centre)
      .field("slow_weights", out.slow_weights)
      .field("slow_centres", out.slow_centres)
      .field("delay", out.delay)
      .field("time_constant", out.time_constant)
      .field("initial", out.initial)
      .field("burst", out.burst)
      .done();
  return out;
}

py::dict as_dict(const Decision& decision) {
  py::dict out;
  out["window"] = decision.window;
  out["t"] = decision.signal.t;
  out["value"] = decision.signal.value;
  out["age"] = decision.signal.age;
  out["quality"] = name(decision.signal.quality);
  out["urgent"] = decision.signal.urgent;
  out["fast"] = decision.fast;
  out["slow"] = decision.slow;
  out["action"] = name(decision.action);
  out["reason"] = name(decision.reason);
  out["direction"] = decision.direction;
  out["at_open_rail"] = decision.at_open_rail;
  out["at_tight_rail"] = decision.at_tight_rail;
  out["reversals"] = decision.reversals;
  out["blanking"] = decision.blanking;
  out["dwell"] = decision.dwell;
  out["fast_step"] = decision.fast_step;
  return out;
}

}  // namespace

void bind_control(py::module_& module) {
  py::class_<Controller>(module, "Controller")
      .def(py::init([](const std::string& kind, const py::kwargs& settings) {
             return make_controller(kind, control_settings(settings));
           }),
           py::arg("kind"))
      .def(
          "step",
          [](Controller& controller, double value, double t, double age, const std::string& quality,
             bool urgent) {
            return as_dict(controller.step(
                {.t = t, .value = value, .age = age, .quality = signal_quality(quality), .urgent = urgent}));
          },
          py::arg("value"), py::arg("t") = 0.0, py::kw_only(), py::arg("age") = 0.0,
          py::arg("quality") = "exact", py::arg("urgent") = false)
      .def("state", &Controller::state)
      .def("restore", &Controller::restore, py::arg("numbers"));
  py::class_<Plant>(module, "Plant")
      .def(py::init([](const py::kwargs& settings) { return Plant(plant_settings(settings)); }))
      .def("step", &Plant::step, py::arg("fast"), py::arg("slow") = std::vector<double>{}, py::kw_only(),
           py::arg("scale") = 1.0, py::arg("added") = 0.0)
      .def("steady", &Plant::steady, py::arg("fast"), py::arg("slow") = std::vector<double>{});
}

}  // namespace edgert
