// Builtins made of Python's C interface: pybind11's functions cost as much as what these replace. PyTorch is known by
// the names of attributes alone; what else is needed of it is handed over when a builtin is made.
#pragma once
#include <pybind11/pybind11.h>

#include <utility>

namespace slowfast_fast {

namespace py = pybind11;

inline py::object owned(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

inline py::object attribute(const py::object& of, PyObject* name) { return owned(PyObject_GetAttr(of.ptr(), name)); }

inline py::object call(const py::object& function, PyObject* const* arguments, Py_ssize_t count) {
  return owned(PyObject_Vectorcall(function.ptr(), arguments, static_cast<size_t>(count), nullptr));
}

inline bool says_yes(const py::object& function) { return call(function, nullptr, 0).ptr() == Py_True; }

inline PyObject* type_of(PyObject* value) { return reinterpret_cast<PyObject*>(Py_TYPE(value)); }

struct Items {
  PyObject* const* data;
  Py_ssize_t size;

  explicit Items(PyObject* tuple) : data(PySequence_Fast_ITEMS(tuple)), size(PyTuple_GET_SIZE(tuple)) {}
  PyObject* const* begin() const { return data; }
  PyObject* const* end() const { return data + size; }
};

template <class Function>
PyObject* called(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  try {
    return (*static_cast<Function*>(PyCapsule_GetPointer(self, Function::kName)))(arguments, count).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  }
  return nullptr;
}

// A builtin that calls `function`, whose class has kName and kDoc.
template <class Function>
py::object builtin(Function function) {
  static PyMethodDef definition{Function::kName,
                                reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&called<Function>)),
                                METH_FASTCALL, Function::kDoc};
  const py::capsule state(new Function(std::move(function)), Function::kName, [](PyObject* capsule) {
    delete static_cast<Function*>(PyCapsule_GetPointer(capsule, Function::kName));
  });
  return owned(PyCFunction_New(&definition, state.ptr()));
}

}  // namespace slowfast_fast
