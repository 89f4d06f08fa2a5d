//! Corpora: what is read from archives and folders, in which order, and what is refused.

use std::path::{Path, PathBuf};

use laam::corpus::{
    Corpus, CorpusOptions, Document, Encoding, Manifest, NameFilter, Reason, Source, SourceOrigin,
};
use laam::error::{ErrorKind, kind_of};

use crate::support::linux;

/// All documents and the manifest, or the error that ended the pass.
pub fn read(path: &Path, options: CorpusOptions) -> anyhow::Result<(Vec<Document>, Manifest)> {
    let mut documents = Corpus::open(&Source::Path(path.to_path_buf()), options)?.documents()?;
    let all = (&mut documents).collect::<anyhow::Result<Vec<_>>>()?;
    Ok((all, documents.into_manifest()))
}

pub fn paths(documents: &[Document]) -> Vec<&str> {
    documents.iter().map(|document| document.path.as_str()).collect()
}

#[test]
fn linux_is_506_files_with_the_known_hash() {
    let Some(archive) = linux() else { return };
    let (documents, manifest) = read(&archive, CorpusOptions::default()).unwrap();
    assert_eq!((manifest.files.len(), manifest.bytes()), (506, 4_537_588));
    assert_eq!(manifest.hash(), "49083d3a3250618ea5ec287e87478e649bbaf3752246ac9d8aad3c40597804fc");
    let mut reversed = manifest.clone();
    reversed.files.reverse();
    assert_eq!(reversed.hash(), manifest.hash());
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
    let (all, _) = read(&archive, CorpusOptions::default()).unwrap();
    let limited = CorpusOptions { limit: Some(7), ..CorpusOptions::default() };
    let (first, manifest) = read(&archive, limited).unwrap();
    assert_eq!(first, all[..7]);
    assert_eq!((manifest.files.len(), manifest.limit), (7, Some(7)));
}

#[test]
fn a_folder_is_sorted_bytewise_and_named_from_itself() {
    let folder = tempfile::tempdir().unwrap();
    let names = ["b.c", "a/z.c", "a-b/y.h", "a.c", "a/B.S", "Z.rs", "deep/er/x.txt", "a/no.o"];
    write_files(folder.path(), &names);
    let (documents, manifest) = read(folder.path(), CorpusOptions::default()).unwrap();
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

#[test]
fn links_in_a_folder_are_not_followed() {
    use std::os::unix::fs::symlink;
    let outside = tempfile::tempdir().unwrap();
    write_files(outside.path(), &["secret.c"]);
    let folder = tempfile::tempdir().unwrap();
    write_files(folder.path(), &["a.c"]);
    symlink(outside.path(), folder.path().join("way_out")).unwrap();
    symlink(".", folder.path().join("loop")).unwrap();
    symlink(outside.path().join("secret.c"), folder.path().join("b.c")).unwrap();
    symlink("nowhere", folder.path().join("c.c")).unwrap();
    let pipe = std::process::Command::new("mkfifo").arg(folder.path().join("d.c")).status();
    assert!(pipe.unwrap().success());
    let (documents, manifest) = read(folder.path(), CorpusOptions::default()).unwrap();
    assert_eq!(paths(&documents), ["a.c"]);
    let left: Vec<_> =
        manifest.left_out.iter().map(|left| (left.name.as_str(), left.reason)).collect();
    assert_eq!(left, [("b.c", Reason::Link), ("c.c", Reason::Link), ("d.c", Reason::Special)]);
    // Nothing is lost by that: --strict has no objection.
    let strict = CorpusOptions { strict: true, ..CorpusOptions::default() };
    assert_eq!(read(folder.path(), strict).unwrap().0.len(), 1);
}

#[test]
fn what_is_not_utf8_is_left_out_or_refused_or_read_as_latin1() {
    let folder = tempfile::tempdir().unwrap();
    write_files(folder.path(), &["a.c", "z.c"]);
    std::fs::write(folder.path().join("b.c"), b"/* Gr\xfc\xdfe */\r\n").unwrap();

    let (documents, manifest) = read(folder.path(), CorpusOptions::default()).unwrap();
    assert_eq!(paths(&documents), ["a.c", "z.c"]);
    assert_eq!(manifest.warnings(), ["1 file left out (not UTF-8): b.c"]);

    let strict = CorpusOptions { strict: true, ..CorpusOptions::default() };
    let why = read(folder.path(), strict).unwrap_err();
    assert_eq!(format!("{why:#}"), format!("b.c is not UTF-8, {}", folder.path().display()));
    assert_eq!(kind_of(&why), Some(ErrorKind::Data));

    let latin1 = CorpusOptions { encoding: Encoding::Latin1, ..CorpusOptions::default() };
    let (documents, manifest) = read(folder.path(), latin1).unwrap();
    assert_eq!(documents[1].text, "/* Gr\u{fc}\u{df}e */\r\n");
    // The record is of the bytes as they were.
    assert_eq!((manifest.files[1].bytes, manifest.left_out.len()), (13, 0));
}

#[test]
fn a_source_without_source_files_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    write_files(folder.path(), &["Makefile", "a.o"]);
    for path in [folder.path(), &folder.path().join("Makefile"), &folder.path().join("none")] {
        let why = read(path, CorpusOptions::default()).unwrap_err();
        assert_eq!(kind_of(&why), Some(ErrorKind::Data), "{why:#}");
        assert!(format!("{why:#}").contains(&folder.path().display().to_string()), "{why:#}");
    }
}

#[test]
fn files_with_other_suffixes_are_counted_and_named() {
    let folder = tempfile::tempdir().unwrap();
    write_files(folder.path(), &["a.c", "b.py", "README", "d/c.md"]);
    // No text of the project, and perhaps with credentials.
    write_files(folder.path(), &[".git/config", ".git/refs/heads/fix.c", "d/.git/logs/fix.md"]);
    let (documents, manifest) = read(folder.path(), CorpusOptions::default()).unwrap();
    assert_eq!(paths(&documents), ["a.c"]);
    let warning = "3 files left out (by their suffix; `include` takes them): README, b.py, d/c.md";
    assert_eq!(manifest.warnings(), [warning]);
    // Whatever the suffix, if a glob says so; what nobody asked for is no loss then.
    let filter = |include: &[&str], exclude: &[&str]| {
        let [include, exclude] = [include, exclude]
            .map(|globs| globs.iter().map(|glob| (*glob).to_string()).collect::<Vec<_>>());
        let filter = NameFilter::new(&include, &exclude).unwrap();
        read(folder.path(), CorpusOptions { filter, ..CorpusOptions::default() })
    };
    let (documents, manifest) = filter(&["*.py", "*.md"], &["b.*"]).unwrap();
    assert_eq!(paths(&documents), ["d/c.md"]);
    assert_eq!(manifest.warnings(), [] as [&str; 0]);
    assert_eq!((manifest.include.len(), manifest.exclude.len(), manifest.filter.len()), (2, 1, 0));
    let nothing = format!("{:#}", filter(&[], &["*.c"]).unwrap_err());
    assert!(nothing.contains("3 files left out") && nothing.contains("README"), "{nothing}");
}

#[test]
fn one_file_is_a_corpus_and_other_formats_are_named() {
    let folder = tempfile::tempdir().unwrap();
    write_files(folder.path(), &["deep/notes.txt", "Makefile"]);
    let open = |name: &str, include: &[String]| {
        let filter = NameFilter::new(include, &[]).unwrap();
        read(&folder.path().join(name), CorpusOptions { filter, ..CorpusOptions::default() })
    };
    let (documents, manifest) = open("deep/notes.txt", &[]).unwrap();
    assert_eq!(
        (paths(&documents), documents[0].text.as_str()),
        (vec!["notes.txt"], "deep/notes.txt")
    );
    assert_eq!(manifest.origin, SourceOrigin::File);
    assert_eq!(paths(&open("Makefile", &["Make*".to_string()]).unwrap().0), ["Makefile"]);
    let error = |name: &str| format!("{:#}", open(name, &[]).unwrap_err());
    assert!(error("Makefile").contains("is it an archive?"));
    for (magic, format) in
        [(&b"PK\x03\x04"[..], "a zip file"), (b"\x28\xB5\x2F\xFD", "a zstd file")]
    {
        std::fs::write(folder.path().join("x.bin"), magic).unwrap();
        assert!(error("x.bin").contains(format), "{}", error("x.bin"));
    }
    let why = read(Path::new("https://me:secret@host/a.tar.xz?t=1"), CorpusOptions::default());
    let why = format!("{:#}", why.unwrap_err());
    assert!(why.contains("https://host/a.tar.xz is a URL") && !why.contains("secret"), "{why}");
}

#[test]
fn corpus_passes_are_identical_and_can_be_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let names: Vec<_> = (0..200).map(|i| format!("{i:03}.c")).collect();
    write_files(folder.path(), &names.iter().map(String::as_str).collect::<Vec<_>>());
    let source = Source::Path(folder.path().to_path_buf());
    let corpus = Corpus::open(&source, CorpusOptions::default()).unwrap();
    let mut half = corpus.documents().unwrap();
    assert_eq!(half.next().unwrap().unwrap().path, "000.c");
    assert_eq!(half.manifest().files.len(), 1);
    drop(half);
    let all = || corpus.documents().unwrap().collect::<anyhow::Result<Vec<_>>>().unwrap();
    assert_eq!(all().len(), 200);
    assert_eq!(all(), all());
    assert_eq!(corpus.manifest().unwrap().files.len(), 200);
}
