//! Files of Linux 1.0, known by their bytes wherever they come from.

use super::manifest::FileRecord;
use super::unhex;

/// The first 16 bytes of the SHA-256 of each file of Linux 1.0 that counts by its name, sorted:
/// 506 files, the empty one left out.
static LINUX_1_0: &[u8] = include_bytes!("linux-1.0.sha256");

/// Manifest hash of Linux 1.0 whole.
const LINUX_1_0_MANIFEST: &str = "49083d3a3250618ea5ec287e87478e649bbaf3752246ac9d8aad3c40597804fc";

/// Number of files that are byte for byte one of Linux 1.0's.
pub fn linux_1_0_files(files: &[FileRecord]) -> usize {
    let is_known = |file: &&FileRecord| unhex(&file.sha256).is_ok_and(|hash| is_linux_file(&hash));
    files.iter().filter(is_known).count()
}

/// True if this is the SHA-256 of one of Linux 1.0's files.
pub fn is_linux_file(sha256: &[u8]) -> bool {
    let (known, _) = LINUX_1_0.as_chunks::<16>();
    known.binary_search_by(|entry| entry[..].cmp(&sha256[..16])).is_ok()
}

/// True if this is the manifest hash of Linux 1.0 whole.
pub fn is_linux_1_0(manifest_sha256: &str) -> bool {
    manifest_sha256 == LINUX_1_0_MANIFEST
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_is_no_file_of_linux_1_0() {
        let (known, rest) = LINUX_1_0.as_chunks::<16>();
        assert_eq!((known.len(), rest.len()), (506, 0));
        assert!(known.is_sorted());
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let file = FileRecord { path: "a.h".to_string(), sha256: empty.to_string(), bytes: 0 };
        assert_eq!(linux_1_0_files(&[file]), 0);
    }
}
