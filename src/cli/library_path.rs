//! No code from the current folder: the system's loader searches it for every library if `LD_LIBRARY_PATH`
//! has an empty or a relative entry, as `LD_LIBRARY_PATH=$LD_LIBRARY_PATH:/opt/lib` easily does.

use std::env;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::process::Command;

const VARIABLE: &str = "LD_LIBRARY_PATH";

/// Starts the program again without such entries if there are some: the loader has read them already.
pub fn leave_out_current_folder() {
    let Some(given) = env::var_os(VARIABLE) else { return };
    let Some(absolute) = without_relative(&given) else { return };
    let mut arguments = env::args_os();
    let mut again = Command::new("/proc/self/exe");
    again.env(VARIABLE, absolute).arg0(arguments.next().unwrap_or_default()).args(arguments);
    // Returns only if it fails, as without /proc: then the loader does as it was told.
    let _ = again.exec();
}

/// The list without entries that are not absolute paths; `None` if all are.
fn without_relative(list: &OsStr) -> Option<OsString> {
    if list.is_empty() {
        return None;
    }
    // The loader takes both separators.
    let entries: Vec<&[u8]> = list.as_bytes().split(|byte| b":;".contains(byte)).collect();
    let absolute: Vec<&[u8]> =
        entries.iter().copied().filter(|entry| entry.starts_with(b"/")).collect();
    (absolute.len() < entries.len()).then(|| OsString::from_vec(absolute.join(&b':')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_that_mean_the_current_folder_are_left_out() {
        let of = |list: &str| without_relative(OsStr::new(list));
        assert_eq!(of(""), None);
        assert_eq!(of("/a:/b/c"), None);
        for (list, expected) in
            [(":", ""), (":/a", "/a"), ("/a:", "/a"), ("/a:.:/b", "/a:/b"), ("lib;/a", "/a")]
        {
            assert_eq!(of(list).unwrap(), expected, "{list}");
        }
    }
}
