//! An exchange as the stand-in for NCCL hands it to the driver: the layout of a call between two libraries.

/// Bytes of device memory.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub at: u64,
    pub bytes: usize,
}

/// An exchange of bytes with other processes, as work of a stream.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Exchange {
    /// What is sent, and where what comes is written.
    pub sends: *const Span,
    pub send_count: usize,
    pub receives: *const Span,
    pub receive_count: usize,
    /// Executes the exchange of a number: all bytes that are sent, one span after the other, and those that
    /// come. 0 if they came.
    pub execute: extern "C" fn(number: u64, sent: *const u8, came: *mut u8) -> u32,
    pub number: u64,
}
