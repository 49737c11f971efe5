// What look_up() in calls.cpp makes a signature of.
#pragma once
#include <array>
#include <cstring>

#include "builtin.h"

namespace slowfast_fast {

// A number from 1 on for every object that is equal to none before it. They are kept.
class Numbers {
 public:
  int64_t of(PyObject* object) {
    if (PyObject* known = PyDict_GetItemWithError(numbers_.ptr(), object)) return PyLong_AsLongLong(known);
    if (PyErr_Occurred()) throw py::error_already_set();
    const int64_t next = static_cast<int64_t>(numbers_.size()) + 1;
    numbers_[object] = next;
    return next;
  }

 private:
  py::dict numbers_;
};

// A signature as it is written. It becomes invalid by what it cannot hold.
class Words {
 public:
  void add(int64_t word) {
    if (count_ == words_.size()) valid_ = false;
    else words_[count_++] = word;
  }

  // The type is a word of its own, since True, 1 and 1.0 are equal, but not as options.
  void add_option(PyObject* option) {
    enum : int64_t { kNone, kBool, kInt, kFloat };
    if (option == Py_None) {
      add(kNone);
    } else if (PyBool_Check(option)) {
      add(kBool);
      add(option == Py_True);
    } else if (PyLong_CheckExact(option)) {
      add(kInt);
      add_integer(option);
    } else if (PyFloat_CheckExact(option)) {
      const double value = PyFloat_AS_DOUBLE(option);
      int64_t bits;
      static_assert(sizeof bits == sizeof value);
      std::memcpy(&bits, &value, sizeof bits);
      add(kFloat);
      add(bits);
    } else {
      valid_ = false;
    }
  }

  // Sizes or strides.
  void add_integers(const py::object& integers) {
    if (!PyTuple_Check(integers.ptr())) return reject();
    const Items items(integers.ptr());
    add(items.size);
    for (PyObject* item : items) {
      if (!PyLong_CheckExact(item)) return reject();
      add_integer(item);
    }
  }

  void reject() { valid_ = false; }
  bool valid() const { return valid_; }

  py::object bytes() const {
    return owned(PyBytes_FromStringAndSize(reinterpret_cast<const char*>(words_.data()),
                                           static_cast<Py_ssize_t>(count_ * sizeof words_[0])));
  }

 private:
  void add_integer(PyObject* integer) {
    int overflow = 0;
    add(PyLong_AsLongLongAndOverflow(integer, &overflow));
    if (overflow != 0) reject();
  }

  // No op's signature has more than 70.
  std::array<int64_t, 128> words_;
  size_t count_ = 0;
  bool valid_ = true;
};

// What a signature has of tensors, which must be of one of `classes`. Their attributes are found once, in the first
// class: to find one takes as long as to read it.
class TensorReader {
 public:
  TensorReader(py::tuple classes, const py::object& cpu)
      : classes_(std::move(classes)),
        shape_(classes_[0].attr("shape")),
        stride_(classes_[0].attr("stride")),
        dtype_(classes_[0].attr("dtype")),
        device_(classes_[0].attr("device")) {
    devices_.of(cpu.ptr());
  }

  enum : int64_t { kNowhere, kCpu };

  // Returns a number for the device: the above, or another one.
  int64_t add(PyObject* tensor, Words& words) {
    if (tensor == Py_None) {
      words.add(kNowhere);
      return kNowhere;
    }
    if (!is_plain(tensor)) {
      words.reject();
      return kNowhere;
    }
    const int64_t device = devices_.of(read(device_, tensor).ptr());
    words.add(device);
    words.add(dtype_of(tensor));
    words.add_integers(read(shape_, tensor));
    words.add_integers(call(stride_, &tensor, 1));
    return device;
  }

  void add_vector(PyObject* vector, Words& words) const {
    if (vector == Py_None) words.add(0);
    else if (is_plain(vector)) words.add(dtype_of(vector));
    else words.reject();
  }

 private:
  bool is_plain(PyObject* tensor) const {
    for (PyObject* one : Items(classes_.ptr()))
      if (type_of(tensor) == one) return true;
    return false;
  }

  static py::object read(const py::object& descriptor, PyObject* of) {
    return owned(Py_TYPE(descriptor.ptr())->tp_descr_get(descriptor.ptr(), of, type_of(of)));
  }

  // Its address: PyTorch has one object for a dtype, for good.
  int64_t dtype_of(PyObject* tensor) const { return reinterpret_cast<int64_t>(read(dtype_, tensor).ptr()); }

  py::tuple classes_;
  py::object shape_, stride_, dtype_, device_;
  Numbers devices_;
};

}  // namespace slowfast_fast
