//! Work of a stream, and its execution.

use std::sync::Arc;
use std::time::Instant;

use gemm_common::Parallelism;
use gemm_f32::gemm::f32::get_gemm_fn;
use half::{bf16, f16};
use ptx_race::{Arg, Config, FaultKind, Kernel, Memory, MemoryError, Options};

use crate::codes::Code;
use crate::exchange::Span;
use crate::gemm::{Gemm, Operand};

/// One operation of a stream.
#[derive(Clone)]
pub(crate) enum Op {
    Write {
        to: u64,
        bytes: Arc<[u8]>,
    },
    Set {
        at: u64,
        byte: u8,
        len: usize,
    },
    Copy {
        from: u64,
        to: u64,
        len: usize,
    },
    Kernel {
        kernel: Kernel,
        config: Config,
        args: Vec<Arg>,
    },
    Gemm(Gemm),
    Exchange(QueuedExchange),
    /// An event's handle, and which of its recordings this is.
    Event(usize, u64),
}

/// An exchange with other processes, by the stand-in for NCCL.
#[derive(Clone)]
pub(crate) struct QueuedExchange {
    pub sends: Vec<Span>,
    pub receives: Vec<Span>,
    pub execute: extern "C" fn(u64, *const u8, *mut u8) -> u32,
    pub number: u64,
}

impl QueuedExchange {
    /// Exchanges bytes; an exchange that was aborted writes none, as a kernel that ends early.
    fn run(&self, memory: &Memory) -> Result<(), MemoryError> {
        let mut sent = Vec::new();
        for span in &self.sends {
            sent.extend(memory.read_vec(span.at, span.bytes)?);
        }
        let mut came = vec![0; self.receives.iter().map(|span| span.bytes).sum()];
        if (self.execute)(self.number, sent.as_ptr(), came.as_mut_ptr()) != 0 {
            return Ok(());
        }
        let mut rest = came.as_slice();
        for span in &self.receives {
            let (bytes, later) = rest.split_at(span.bytes);
            memory.write(span.at, bytes)?;
            rest = later;
        }
        Ok(())
    }
}

/// The outcome of an operation.
pub(crate) enum Done {
    Plain,
    Event(usize, u64, Instant),
}

/// Executes an operation. An error is logged with what is known of it: a driver would return its code
/// alone.
pub(crate) fn execute(op: &Op, memory: &Memory, options: &Options) -> Result<Done, Code> {
    let illegal = |what: &str, e: MemoryError| {
        eprintln!("cuda-standin: {what}: {e}");
        Code::ILLEGAL_ADDRESS
    };
    match op {
        Op::Write { to, bytes } => {
            memory.write(*to, bytes).map_err(|e| illegal("copy to device", e))?;
        }
        Op::Set { at, byte, len } => {
            memory.write(*at, &vec![*byte; *len]).map_err(|e| illegal("memset", e))?;
        }
        Op::Copy { from, to, len } => {
            let copy = || memory.write(*to, &memory.read_vec(*from, *len)?);
            copy().map_err(|e| illegal("copy", e))?;
        }
        Op::Kernel { kernel, config, args } => {
            kernel.launch(memory, config, args, options).map_err(|fault| {
                eprintln!("cuda-standin: {fault}");
                code(fault.kind)
            })?;
        }
        Op::Gemm(gemm) => multiply(gemm, memory).map_err(|e| illegal("matmul", e))?,
        Op::Exchange(exchange) => exchange.run(memory).map_err(|e| illegal("exchange", e))?,
        Op::Event(event, recording) => return Ok(Done::Event(*event, *recording, Instant::now())),
    }
    Ok(Done::Plain)
}

/// The code that a kernel's fault leaves behind (`CUresult`).
fn code(fault: FaultKind) -> Code {
    match fault {
        // A GPU would read garbage from memory that nothing wrote; the stand-in is strict.
        FaultKind::OutOfBounds | FaultKind::UseAfterFree | FaultKind::Uninitialized => {
            Code::ILLEGAL_ADDRESS
        }
        FaultKind::Misaligned => Code::MISALIGNED_ADDRESS,
        FaultKind::Budget | FaultKind::Deadlock => Code::LAUNCH_TIMEOUT,
        _ => Code::LAUNCH_FAILED,
    }
}

/// Computes a matmul as host loops: the call that laam's simulated device makes, so that the bits are
/// the same.
fn multiply(gemm: &Gemm, memory: &Memory) -> Result<(), MemoryError> {
    let (m, n, k) = (gemm.m as usize, gemm.n as usize, gemm.k as usize);
    let stored = |operand: &Operand, rows, cols| {
        if operand.transposed == 0 { (rows, cols) } else { (cols, rows) }
    };
    for at in 0..gemm.batch {
        let (a_rows, a_cols) = stored(&gemm.a, m, k);
        let (b_rows, b_cols) = stored(&gemm.b, k, n);
        let a = read(&gemm.a, at, a_rows, a_cols, memory)?;
        let b = read(&gemm.b, at, b_rows, b_cols, memory)?;
        let accumulate = gemm.beta != 0.0;
        let mut d = if accumulate { read(&gemm.c, at, m, n, memory)? } else { vec![0.0; m * n] };
        let part = |d: &mut [f32], from: usize, to: usize, accumulate: bool| {
            // (column stride, row stride) of the matrix as it is multiplied.
            let strides = |operand: &Operand, rows: usize| {
                if operand.transposed == 0 { (rows as isize, 1) } else { (1, rows as isize) }
            };
            let ((a_col, a_row), (b_col, b_row)) =
                (strides(&gemm.a, a_rows), strides(&gemm.b, b_rows));
            let (a_from, b_from) = (from as isize * a_col, from as isize * b_row);
            // SAFETY: a, b and d are dense vectors of rows * cols elements; the strides stay within
            // them for m, n and the part `from..to` of k.
            unsafe {
                get_gemm_fn()(
                    m,
                    n,
                    to - from,
                    d.as_mut_ptr(),
                    m as isize,
                    1,
                    accumulate,
                    a.as_ptr().offset(a_from),
                    a_col,
                    a_row,
                    b.as_ptr().offset(b_from),
                    b_col,
                    b_row,
                    gemm.beta,
                    gemm.alpha,
                    false,
                    false,
                    false,
                    Parallelism::None,
                );
            }
        };
        if gemm.split_in_output_type == 0 {
            part(&mut d, 0, k, accumulate);
        } else {
            let mut second = vec![0.0; m * n];
            part(&mut d, 0, k / 2, accumulate);
            part(&mut second, k / 2, k, false);
            for (d, second) in d.iter_mut().zip(second) {
                *d = round(gemm.d.dtype, *d) + round(gemm.d.dtype, second);
            }
        }
        for (col, column) in d.chunks_exact(m).enumerate() {
            let size = element_size(gemm.d.dtype);
            let first = at * gemm.d.stride + col as u64 * gemm.d.ld;
            if gemm.d.ld == gemm.m {
                memory.write(gemm.d.at + size * first, &encode(gemm.d.dtype, &d))?;
                break;
            }
            memory.write(gemm.d.at + size * first, &encode(gemm.d.dtype, column))?;
        }
    }
    Ok(())
}

pub(crate) fn element_size(dtype: u32) -> u64 {
    if dtype == 0 { 4 } else { 2 }
}

/// A matrix of a batch as it is stored, without the gaps between columns.
fn read(
    operand: &Operand,
    at: u64,
    rows: usize,
    cols: usize,
    memory: &Memory,
) -> Result<Vec<f32>, MemoryError> {
    let size = element_size(operand.dtype);
    let (rows, cols, each) =
        if operand.ld == rows as u64 { (rows * cols, 1, 0) } else { (rows, cols, operand.ld) };
    let mut values = Vec::with_capacity(rows * cols);
    for col in 0..cols as u64 {
        let first = at * operand.stride + col * each;
        let bytes = memory.read_vec(operand.at + size * first, rows * size as usize)?;
        match operand.dtype {
            0 => values.extend(bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes))),
            2 => {
                let halves = bytes.as_chunks().0.iter();
                values.extend(halves.map(|&bytes| f16::from_le_bytes(bytes).to_f32()));
            }
            _ => {
                let halves = bytes.as_chunks().0.iter();
                values.extend(halves.map(|&bytes| bf16::from_le_bytes(bytes).to_f32()));
            }
        }
    }
    Ok(values)
}

fn round(dtype: u32, value: f32) -> f32 {
    match dtype {
        0 => value,
        2 => f16::from_f32(value).to_f32(),
        _ => bf16::from_f32(value).to_f32(),
    }
}

fn encode(dtype: u32, values: &[f32]) -> Vec<u8> {
    match dtype {
        0 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        2 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
    }
}
