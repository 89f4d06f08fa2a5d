//! Downloads against a server in the test.
