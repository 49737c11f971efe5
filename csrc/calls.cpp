// Builtins rather than pybind11's functions, whose calls cost as much as what these replace. PyTorch is known by the
// names of attributes alone; what else is needed of it is handed over when a function is made.
#include "calls.h"

#include <algorithm>
#include <array>
#include <utility>

namespace py = pybind11;

namespace slowfast_fast {
namespace {

struct Names {
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* device = PyUnicode_InternFromString("device");
  PyObject* is_cuda = PyUnicode_InternFromString("is_cuda");
  PyObject* recorder = PyUnicode_InternFromString("recorder");
  PyObject* forced = PyUnicode_InternFromString("forced");
  PyObject* op = PyUnicode_InternFromString("_op");
  PyObject* handle = PyUnicode_InternFromString("_handle");
  PyObject* enter = PyUnicode_InternFromString("__enter__");
  PyObject* exit = PyUnicode_InternFromString("__exit__");
};

const Names& names() {
  static const Names all;
  return all;
}

py::object owned(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

py::object attribute(PyObject* of, PyObject* name) { return owned(PyObject_GetAttr(of, name)); }

py::object call(PyObject* function, PyObject* const* arguments, Py_ssize_t count) {
  return owned(PyObject_Vectorcall(function, arguments, static_cast<size_t>(count), nullptr));
}

PyObject* type_of(PyObject* value) { return reinterpret_cast<PyObject*>(Py_TYPE(value)); }

struct Items {
  PyObject* const* data;
  Py_ssize_t size;

  explicit Items(PyObject* tuple) : data(PySequence_Fast_ITEMS(tuple)), size(PyTuple_GET_SIZE(tuple)) {}
  PyObject* const* begin() const { return data; }
  PyObject* const* end() const { return data + size; }
};

class Tuple {
 public:
  explicit Tuple(Py_ssize_t size) : tuple_(owned(PyTuple_New(size))) {}
  void add(py::object item) { PyTuple_SET_ITEM(tuple_.ptr(), filled_++, item.release().ptr()); }
  void add(PyObject* item) { add(py::reinterpret_borrow<py::object>(item)); }
  py::object take() { return std::move(tuple_); }

 private:
  py::object tuple_;
  Py_ssize_t filled_ = 0;
};

py::object no_plan() { return py::make_tuple(py::none(), py::none()); }

// A digit for the type of an option, since True and 1 are equal as keys, but not as options; 0 for what no option is.
long type_digit(PyObject* option) {
  if (option == Py_None) return 1;
  if (PyBool_Check(option)) return 2;
  if (PyLong_CheckExact(option)) return 3;
  if (PyFloat_CheckExact(option)) return 4;
  return 0;
}
constexpr long kTypeDigits = 5;

// State: see _C.pyi.
py::object look_up(PyObject* state, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 4 || !PyTuple_CheckExact(arguments[1]) || !PyTuple_CheckExact(arguments[2]) ||
      !PyTuple_CheckExact(arguments[3]) || PyTuple_GET_SIZE(arguments[2]) < 1)
    throw py::type_error("look_up takes the name of an op and three tuples: options, tensors (at least one), vectors");
  const Items given(state), options(arguments[1]), tensors(arguments[2]), vectors(arguments[3]);
  PyObject *plans = given.data[1], *watching = given.data[2], *forcing = given.data[3];
  PyObject *function_mode = given.data[4], *deterministic = given.data[5], *allows_tf32 = given.data[6];

  const auto plain = [classes = Items(given.data[0])](PyObject* tensor) {
    for (PyObject* one : classes)
      if (type_of(tensor) == one) return true;
    return false;
  };
  if (attribute(watching, names().recorder).ptr() != Py_None || call(function_mode, nullptr, 0).ptr() == Py_True)
    return no_plan();

  constexpr int kSettings = 5, kOfTensor = 4;  // the op, the options' types, TF32, the backend, determinism
  Tuple key(kSettings + options.size + kOfTensor * tensors.size + vectors.size);
  long types = 0;
  for (PyObject* option : options) {
    const long digit = type_digit(option);
    if (digit == 0) return no_plan();
    types = types * kTypeDigits + digit;
    key.add(option);
  }
  for (PyObject* tensor : tensors) {
    if (tensor == Py_None) {
      for (int i = 0; i < kOfTensor; ++i) key.add(Py_None);
      continue;
    }
    if (!plain(tensor)) return no_plan();
    key.add(attribute(tensor, names().shape));
    key.add(owned(PyObject_VectorcallMethod(names().stride, &tensor, 1, nullptr)));
    key.add(attribute(tensor, names().dtype));
    key.add(attribute(tensor, names().device));
  }
  for (PyObject* vector : vectors) {
    if (vector != Py_None && !plain(vector)) return no_plan();
    key.add(vector == Py_None ? py::none() : attribute(vector, names().dtype));
  }
  PyObject* x = tensors.data[0];
  const bool on_cuda = x != Py_None && attribute(x, names().is_cuda).ptr() == Py_True;
  key.add(arguments[0]);
  key.add(owned(PyLong_FromLong(types)));
  key.add(on_cuda ? call(allows_tf32, &x, 1) : py::none());
  key.add(attribute(forcing, names().forced));
  key.add(call(deterministic, nullptr, 0));

  const py::object signature = key.take();
  PyObject* plan = PyDict_GetItemWithError(plans, signature.ptr());
  if (plan == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return py::make_tuple(signature, plan == nullptr ? py::none() : py::reinterpret_borrow<py::object>(plan));
}

// The builtin that an OpOverload's __call__ is a Python function around.
py::object without_frame(PyObject* op) {
  if (PyObject* builtin = PyObject_GetAttr(op, names().op)) return py::reinterpret_steal<py::object>(builtin);
  PyErr_Clear();
  return py::reinterpret_borrow<py::object>(op);
}

py::object call_op(PyObject* boxed, PyObject* const* arguments, Py_ssize_t count) {
  constexpr Py_ssize_t kMost = 32;
  if (boxed == Py_None || count > kMost) return call(without_frame(arguments[0]).ptr(), arguments + 1, count - 1);
  const py::object handle = attribute(arguments[0], names().handle);
  std::array<PyObject*, kMost> with_handle;
  with_handle[0] = handle.ptr();
  std::copy(arguments + 1, arguments + count, with_handle.begin() + 1);
  return call(boxed, with_handle.data(), count);
}

// State: see _C.pyi.
py::object call_eagerly(PyObject* state, PyObject* const* arguments, Py_ssize_t count) {
  if (count < 1) throw py::type_error("an op must be given");
  const Items given(state);
  if (call(given.data[0], nullptr, 0).ptr() == Py_True &&
      call(given.data[1], arguments + 1, count - 1).ptr() == Py_True)
    return call(given.data[3], arguments, count);

  const py::object guard = call(given.data[2], nullptr, 0);
  PyObject* const entering[] = {guard.ptr()};
  PyObject* const leaving[] = {guard.ptr(), Py_None, Py_None, Py_None};
  owned(PyObject_VectorcallMethod(names().enter, entering, 1, nullptr));
  const auto leave = [&] { owned(PyObject_VectorcallMethod(names().exit, leaving, 4, nullptr)); };
  try {
    py::object result = call_op(given.data[4], arguments, count);
    leave();
    return result;
  } catch (py::error_already_set&) {
    leave();
    throw;
  }
}

using Function = py::object (*)(PyObject* state, PyObject* const* arguments, Py_ssize_t count);

template <Function function>
PyObject* guarded(PyObject* state, PyObject* const* arguments, Py_ssize_t count) {
  try {
    return function(state, arguments, count).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  }
  return nullptr;
}

template <Function function>
py::object made(const char* name, const char* doc, const py::tuple& state) {
  static PyMethodDef definition{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&guarded<function>)),
                                METH_FASTCALL, doc};
  return owned(PyCFunction_New(&definition, state.ptr()));
}

}  // namespace

void define_calls(py::module_& module) {
  module.def("make_look_up",
             [](const py::tuple& classes, const py::dict& plans, py::object watching, py::object forcing,
                py::object is_function_mode_enabled, py::object are_algorithms_deterministic, py::object allows_tf32) {
               const auto state = py::make_tuple(classes, plans, watching, forcing, is_function_mode_enabled,
                                                 are_algorithms_deterministic, allows_tf32);
               return made<&look_up>("look_up", "look_up(op, options, tensors, vectors)", state);
             });
  module.def("make_call", [](py::object is_grad_enabled, py::object any_requires_grad, py::object below_autograd,
                             py::object with_gradient, py::object boxed) {
    const auto state = py::make_tuple(is_grad_enabled, any_requires_grad, below_autograd, with_gradient, boxed);
    return made<&call_eagerly>("call_eagerly", "call_eagerly(op, *arguments)", state);
  });
}

}  // namespace slowfast_fast
