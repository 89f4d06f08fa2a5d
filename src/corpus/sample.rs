//! The built-in sample: a toy kernel that runs as an ordinary program. It is training text for a
//! model that must give it back, so its files are frozen: a test holds their hash.

use sha2::{Digest, Sha256};

use super::hex;
use super::manifest::FileRecord;
use super::pass::{Flow, Intake};

macro_rules! files {
    ($($name:literal)*) => {
        /// The names of the files, in bytewise order, below `sample/`.
        pub const NAMES: &[&str] = &[$($name),*];
        const FILES: &[(&str, &str)] =
            &[$((concat!("sample/", $name), include_str!(concat!("sample/", $name)))),*];
    };
}

files!("console.c" "fs.c" "kernel.h" "lib.c" "main.c" "memory.c" "sched.c" "shell.c" "test.c");

/// True if these are the sample's files, all of them and byte for byte, wherever they come from.
pub fn is_sample(files: &[FileRecord]) -> bool {
    let same = |(file, (path, text)): (&FileRecord, &(&str, &str))| {
        file.path == *path && file.sha256 == hex(&Sha256::digest(text))
    };
    files.len() == FILES.len() && files.iter().zip(FILES).all(same)
}

/// True if each of these is one of the sample's files, byte for byte.
pub fn is_part_of_sample(files: &[FileRecord]) -> bool {
    let known: Vec<String> = FILES.iter().map(|(_, text)| hex(&Sha256::digest(text))).collect();
    files.iter().all(|file| known.contains(&file.sha256))
}

pub fn read(intake: &mut Intake) -> anyhow::Result<()> {
    for &(path, text) in FILES {
        if intake.filter().keeps(path.as_bytes())
            && intake.keep(path.to_string(), text.into())? == Flow::Break(())
        {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::corpus::{Corpus, CorpusOptions, Source};

    #[test]
    fn the_sample_is_known_by_its_files_and_not_by_its_name() {
        let files = |source| {
            Corpus::open(&source, CorpusOptions::default()).unwrap().manifest().unwrap().files
        };
        let mut sample = files(Source::Sample);
        assert!(is_sample(&sample));
        let folder = tempfile::tempdir().unwrap();
        let impostor = folder.path().join("built-in sample/sample");
        std::fs::create_dir_all(&impostor).unwrap();
        for name in NAMES {
            std::fs::write(impostor.join(name), "int main(void) { return 1; }\n").unwrap();
        }
        assert!(!is_sample(&files(Source::Path(folder.path().join("built-in sample")))));
        sample.pop();
        assert!(!is_sample(&sample));
    }
}
