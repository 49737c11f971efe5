// Builtins rather than pybind11's functions, whose calls cost as much as what these replace. PyTorch is known by the
// names of attributes alone; what else is needed of it is handed over when a function is made.
#include "calls.h"

#include <utility>

namespace py = pybind11;

namespace slowfast_fast {
namespace {

struct Names {
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* device = PyUnicode_InternFromString("device");
  PyObject* is_meta = PyUnicode_InternFromString("is_meta");
  PyObject* op = PyUnicode_InternFromString("_op");
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

// State: the classes of plain tensors.
py::object signature(PyObject* state, PyObject* const* arguments, Py_ssize_t count) {
  bool tuples = count == 4;
  for (Py_ssize_t i = 0; i < count; ++i) tuples = tuples && PyTuple_CheckExact(arguments[i]);
  if (!tuples) throw py::type_error("signature takes four tuples: settings, options, tensors, vectors");
  const Items classes(state), settings(arguments[0]), options(arguments[1]), tensors(arguments[2]),
      vectors(arguments[3]);

  const auto plain = [&](PyObject* tensor) {
    for (PyObject* one : classes)
      if (type_of(tensor) == one) return true;
    return false;
  };
  // The kernel of that device is the fake one, which checks nothing.
  const auto on_meta = [](PyObject* tensor) { return attribute(tensor, names().is_meta).ptr() == Py_True; };

  constexpr int kOfTensor = 4;
  Tuple key(settings.size + 2 * options.size + kOfTensor * tensors.size + vectors.size);
  for (PyObject* setting : settings) key.add(setting);
  for (PyObject* option : options) {
    key.add(option);
    key.add(type_of(option));  // True and 1 are equal as keys, but not as options
  }
  for (PyObject* tensor : tensors) {
    if (tensor == Py_None) {
      for (int i = 0; i < kOfTensor; ++i) key.add(Py_None);
      continue;
    }
    if (!plain(tensor)) return py::none();
    key.add(attribute(tensor, names().shape));
    key.add(owned(PyObject_VectorcallMethod(names().stride, &tensor, 1, nullptr)));
    key.add(attribute(tensor, names().dtype));
    key.add(attribute(tensor, names().device));
  }
  for (PyObject* vector : vectors) {
    if (vector != Py_None && (!plain(vector) || on_meta(vector))) return py::none();
    key.add(vector == Py_None ? py::none() : attribute(vector, names().dtype));
  }
  return key.take();
}

// The builtin that an OpOverload's __call__ is a Python function around.
py::object without_frame(PyObject* op) {
  if (PyObject* builtin = PyObject_GetAttr(op, names().op)) return py::reinterpret_steal<py::object>(builtin);
  PyErr_Clear();
  return py::reinterpret_borrow<py::object>(op);
}

// State: is_grad_enabled(), any_requires_grad(*arguments), below_autograd(), with_gradient(op, *arguments).
py::object call_eagerly(PyObject* state, PyObject* const* arguments, Py_ssize_t count) {
  if (count < 1) throw py::type_error("an op must be given");
  const Items given(state);
  if (call(given.data[0], nullptr, 0).ptr() == Py_True &&
      call(given.data[1], arguments + 1, count - 1).ptr() == Py_True)
    return call(given.data[3], arguments, count);

  const py::object op = without_frame(arguments[0]);
  const py::object guard = call(given.data[2], nullptr, 0);
  PyObject* const entering[] = {guard.ptr()};
  PyObject* const leaving[] = {guard.ptr(), Py_None, Py_None, Py_None};
  owned(PyObject_VectorcallMethod(names().enter, entering, 1, nullptr));
  py::object result = py::reinterpret_steal<py::object>(
      PyObject_Vectorcall(op.ptr(), arguments + 1, static_cast<size_t>(count - 1), nullptr));
  {
    py::error_scope raised_by_the_op;
    owned(PyObject_VectorcallMethod(names().exit, leaving, 4, nullptr));
  }
  if (!result) throw py::error_already_set();
  return result;
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
  module.def("make_signature", [](const py::tuple& classes) {
    return made<&signature>("signature", "signature(settings, options, tensors, vectors)", classes);
  });
  module.def("make_call", [](py::object is_grad_enabled, py::object any_requires_grad, py::object below_autograd,
                             py::object with_gradient) {
    const auto state = py::make_tuple(is_grad_enabled, any_requires_grad, below_autograd, with_gradient);
    return made<&call_eagerly>("call_eagerly", "call_eagerly(op, *arguments)", state);
  });
}

}  // namespace slowfast_fast
