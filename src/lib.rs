//! laam
