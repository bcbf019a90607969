#pragma once

#include "add_scaled/add_scaled.h"
#include "common/bindings.h"

namespace camkernels::add_scaled_bindings {

void run(Pointer value, Pointer other, Pointer scale, Pointer out, int64_t rows, int64_t length,
         int dtype, int threads) {
  const AddScaled args{at(value), at(other), at<float>(scale), at<float>(out), rows,
                       length,    dtype,     threads};
  CAMKERNELS_RUN(add_scaled, args);
}

void define(py::module_& module) { module.def("add_scaled", &run, Release()); }

}  // namespace camkernels::add_scaled_bindings
