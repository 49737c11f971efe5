#include "calls.h"

#include <algorithm>
#include <array>
#include <utility>

#include "builtin.h"
#include "signature.h"

namespace slowfast_fast {
namespace {

struct Names {
  PyObject* recorder = PyUnicode_InternFromString("recorder");
  PyObject* forced = PyUnicode_InternFromString("forced");
  PyObject* op = PyUnicode_InternFromString("_op");
  PyObject* handle = PyUnicode_InternFromString("_handle");
};

const Names& names() {
  static const Names all;
  return all;
}

// See _C.pyi.
struct LookUp {
  static constexpr const char* kName = "look_up";
  static constexpr const char* kDoc = "look_up(op, options, tensors, vectors)";

  TensorReader reader;
  py::dict plans;
  py::object watching, forcing, is_function_mode_enabled, are_algorithms_deterministic, allows_tf32;
  Numbers texts;

  static py::object no_plan() { return py::make_tuple(py::none(), py::none()); }

  py::object operator()(PyObject* const* arguments, Py_ssize_t count) {
    if (count != 4 || !PyTuple_CheckExact(arguments[1]) || !PyTuple_CheckExact(arguments[2]) ||
        !PyTuple_CheckExact(arguments[3]) || PyTuple_GET_SIZE(arguments[2]) < 1)
      throw py::type_error(
          "look_up takes the name of an op and three tuples: options, tensors (at least one), vectors");
    const Items options(arguments[1]), tensors(arguments[2]), vectors(arguments[3]);
    if (!attribute(watching, names().recorder).is_none() || says_yes(is_function_mode_enabled)) return no_plan();

    Words words;
    words.add(texts.of(arguments[0]));
    for (const Items& items : {options, tensors, vectors}) words.add(items.size);
    for (PyObject* option : options) words.add_option(option);
    PyObject* x = tensors.data[0];
    const int64_t device = reader.add(x, words);
    for (Py_ssize_t i = 1; i < tensors.size; ++i) reader.add(tensors.data[i], words);
    for (PyObject* vector : vectors) reader.add_vector(vector, words);
    words.add(device > TensorReader::kCpu && call(allows_tf32, &x, 1).ptr() == Py_True);
    words.add(texts.of(attribute(forcing, names().forced).ptr()));
    words.add(says_yes(are_algorithms_deterministic));
    if (!words.valid()) return no_plan();

    const py::object signature = words.bytes();
    PyObject* plan = PyDict_GetItemWithError(plans.ptr(), signature.ptr());
    if (plan == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return py::make_tuple(signature, plan == nullptr ? py::none() : py::reinterpret_borrow<py::object>(plan));
  }
};

// A context manager to call something inside of. It is made anew only where the last one is in use, by a call inside of
// the call or by another thread.
class Inside {
 public:
  explicit Inside(py::object make)
      : make_(std::move(make)),
        idle_(make_()),
        enter_(py::type::of(idle_).attr("__enter__")),
        exit_(py::type::of(idle_).attr("__exit__")) {}

  template <class Function>
  py::object run(Function function) {
    py::object taken = std::exchange(idle_, py::object());
    if (!taken) taken = make_();
    PyObject* const arguments[] = {taken.ptr(), Py_None, Py_None, Py_None};
    call(enter_, arguments, 1);
    const auto leave = [&] {
      call(exit_, arguments, 4);
      idle_ = std::move(taken);
    };
    try {
      py::object result = function();
      leave();
      return result;
    } catch (py::error_already_set&) {
      leave();
      throw;
    }
  }

 private:
  py::object make_, idle_, enter_, exit_;
};

// The builtin that an OpOverload's __call__ is a Python function around.
py::object without_frame(PyObject* op) {
  if (PyObject* builtin = PyObject_GetAttr(op, names().op)) return py::reinterpret_steal<py::object>(builtin);
  PyErr_Clear();
  return py::reinterpret_borrow<py::object>(op);
}

// See _C.pyi.
struct CallEagerly {
  static constexpr const char* kName = "call_eagerly";
  static constexpr const char* kDoc = "call_eagerly(op, *arguments)";

  py::object is_grad_enabled, any_requires_grad;
  Inside below_autograd;
  py::object with_gradient, boxed;

  py::object operator()(PyObject* const* arguments, Py_ssize_t count) {
    if (count < 1) throw py::type_error("an op must be given");
    if (says_yes(is_grad_enabled) && call(any_requires_grad, arguments + 1, count - 1).ptr() == Py_True)
      return call(with_gradient, arguments, count);
    return below_autograd.run([&] { return call_op(arguments, count); });
  }

  py::object call_op(PyObject* const* arguments, Py_ssize_t count) const {
    constexpr Py_ssize_t kMost = 32;
    if (boxed.is_none() || count > kMost) return call(without_frame(arguments[0]), arguments + 1, count - 1);
    const py::object handle = owned(PyObject_GetAttr(arguments[0], names().handle));
    std::array<PyObject*, kMost> with_handle;
    with_handle[0] = handle.ptr();
    std::copy(arguments + 1, arguments + count, with_handle.begin() + 1);
    return call(boxed, with_handle.data(), count);
  }
};

}  // namespace

void define_calls(py::module_& module) {
  module.def("make_look_up",
             [](py::tuple classes, const py::object& cpu, py::dict plans, py::object watching, py::object forcing,
                py::object is_function_mode_enabled, py::object are_algorithms_deterministic, py::object allows_tf32) {
               return builtin(LookUp{TensorReader(std::move(classes), cpu),
                                     std::move(plans),
                                     std::move(watching),
                                     std::move(forcing),
                                     std::move(is_function_mode_enabled),
                                     std::move(are_algorithms_deterministic),
                                     std::move(allows_tf32),
                                     {}});
             });
  module.def("make_call", [](py::object is_grad_enabled, py::object any_requires_grad, py::object below_autograd,
                             py::object with_gradient, py::object boxed) {
    return builtin(CallEagerly{std::move(is_grad_enabled), std::move(any_requires_grad),
                               Inside(std::move(below_autograd)), std::move(with_gradient), std::move(boxed)});
  });
}

}  // namespace slowfast_fast
