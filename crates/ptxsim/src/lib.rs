//! Runs the PTX that nvcc emits on a CPU, and finds its races.
