//! Corpora: what is read from archives and folders, in which order, and what is refused.

use std::path::{Path, PathBuf};

use laam::corpus::{Corpus, Document, Manifest, Options, Source};

use crate::support::linux;

/// All documents and the manifest, or the error that ended the pass.
fn read(path: &Path, options: Options) -> anyhow::Result<(Vec<Document>, Manifest)> {
    let mut documents = Corpus::open(&Source::Path(path.to_path_buf()), options)?.documents()?;
    let all = (&mut documents).collect::<anyhow::Result<Vec<_>>>()?;
    Ok((all, documents.into_manifest()))
}

fn paths(documents: &[Document]) -> Vec<&str> {
    documents.iter().map(|document| document.path.as_str()).collect()
}

#[test]
fn linux_is_506_files_with_the_known_hash() {
    let Some(archive) = linux() else { return };
    let (documents, manifest) = read(&archive, Options::default()).unwrap();
    assert_eq!((manifest.files.len(), manifest.bytes()), (506, 4_537_588));
    assert_eq!(manifest.hash(), "49083d3a3250618ea5ec287e87478e649bbaf3752246ac9d8aad3c40597804fc");
    assert_eq!(manifest.left_out, []);
    // In the archive's own order, which is what `tar tf` prints first.
    let text_bytes: usize = documents.iter().map(|document| document.text.len()).sum();
    assert_eq!(text_bytes, 4_537_588);
    assert!(documents.iter().all(|document| document.path.starts_with("linux/")));
    let text = serde_json::to_string(&manifest).unwrap();
    assert_eq!(serde_json::from_str::<Manifest>(&text).unwrap(), manifest);
}

#[test]
fn a_limit_takes_the_first_kept_files() {
    let Some(archive) = linux() else { return };
    let (all, _) = read(&archive, Options::default()).unwrap();
    let limited = Options { limit: Some(7), ..Options::default() };
    let (first, manifest) = read(&archive, limited).unwrap();
    assert_eq!(first, all[..7]);
    assert_eq!((manifest.files.len(), manifest.limit), (7, Some(7)));
}

#[test]
fn a_folder_is_sorted_bytewise_and_named_from_itself() {
    let folder = tempfile::tempdir().unwrap();
    let names = ["b.c", "a/z.c", "a-b/y.h", "a.c", "a/B.S", "Z.rs", "deep/er/x.txt", "a/no.o"];
    write_files(folder.path(), &names);
    let (documents, manifest) = read(folder.path(), Options::default()).unwrap();
    // '-' < '.' < '/': sorting folder by folder would give another order.
    let sorted = ["Z.rs", "a-b/y.h", "a.c", "a/B.S", "a/z.c", "b.c", "deep/er/x.txt"];
    assert_eq!(paths(&documents), sorted);
    assert_eq!(manifest.archive_sha256, None);
    assert_eq!(manifest.source, folder.path().display().to_string());
}

/// Files that hold their own names.
fn write_files(folder: &Path, names: &[&str]) {
    for name in names {
        let file: PathBuf = folder.join(name);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, name).unwrap();
    }
}
