//! Archives made to do harm. Each is built here, byte by byte where need be.

use std::fs;
use std::io::Write;

use laam::corpus::{CorpusOptions, Limits, Reason};
use laam::error::{ErrorKind, kind_of};

use crate::corpus::{paths, read};

/// An archive under construction.
#[derive(Default)]
struct Tar(Vec<u8>);

impl Tar {
    /// A member with any name, type and claimed size, whatever its data.
    fn raw(mut self, name: &[u8], kind: u8, size: u64, data: &[u8]) -> Self {
        let mut header = tar::Header::new_gnu();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name);
        header.set_mode(0o644);
        header.set_size(size);
        header.set_mtime(0);
        header.as_mut_bytes()[156] = kind;
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, name: &str, text: &[u8]) -> Self {
        self.raw(name.as_bytes(), b'0', text.len() as u64, text)
    }

    /// A member of a kind that has no data.
    fn bare(self, name: &str, kind: u8) -> Self {
        self.raw(name.as_bytes(), kind, 0, b"")
    }

    /// GNU's way to give the next member a long name.
    fn long_name(self, name: &[u8]) -> Self {
        self.raw(b"././@LongLink", b'L', name.len() as u64, name)
    }

    /// PAX records for the next member.
    fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut data = Vec::new();
        for (key, value) in records {
            // A record begins with its own length, that number's digits included.
            let rest = key.len() + value.len() + 3;
            let digits = (1..9).find(|&d| (rest + d).to_string().len() == d).unwrap();
            write!(data, "{} {key}=", rest + digits).unwrap();
            data.extend_from_slice(value);
            data.push(b'\n');
        }
        self.raw(b"PaxHeaders/x", b'x', data.len() as u64, &data)
    }

    fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

fn gz(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

fn xz(bytes: &[u8]) -> Vec<u8> {
    let options = lzma_rust2::XzOptions::with_preset(1);
    let mut out = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

/// What a pass over an archive gives: paths, and what was left out.
type Outcome = (Vec<String>, Vec<(String, Reason)>);

fn outcome(bytes: &[u8], options: CorpusOptions) -> anyhow::Result<Outcome> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("archive");
    fs::write(&file, bytes).unwrap();
    let (documents, manifest) = read(&file, options)?;
    let left = manifest.left_out.into_iter().map(|left| (left.name, left.reason)).collect();
    Ok((paths(&documents).into_iter().map(String::from).collect(), left))
}

fn kept(bytes: &[u8]) -> Vec<String> {
    outcome(bytes, CorpusOptions::default()).unwrap().0
}

/// The error of an archive that must be refused: one line, with a hint, saying `about`.
#[track_caller]
fn refused_with(bytes: &[u8], limits: Limits, about: &str) {
    let options = CorpusOptions { limits, ..CorpusOptions::default() };
    let why = outcome(bytes, options).expect_err("it must be refused");
    let text = format!("{why:#}");
    assert!(text.contains(about), "{about:?} is not in: {text}");
    assert!(text.contains("archive") && !text.contains('\n'), "{text}");
    assert_eq!(kind_of(&why), Some(ErrorKind::Data), "{text}");
}

#[track_caller]
fn refused(bytes: &[u8], about: &str) {
    refused_with(bytes, Limits::default(), about);
}

fn left(name: &str, reason: Reason) -> (String, Reason) {
    (name.to_string(), reason)
}

#[test]
fn all_packings_are_read_whatever_the_file_is_called() {
    let plain = Tar::default().bare("d/", b'5').file("d/b.c", b"b").file("./a.h", b"a").end();
    for bytes in
        [plain.clone(), gz(&plain), xz(&plain), [gz(&plain[..700]), gz(&plain[700..])].concat()]
    {
        assert_eq!(kept(&bytes), ["d/b.c", "a.h"]);
    }
}

#[test]
fn zero_bytes_after_a_gzip_member_are_padding() {
    let plain = Tar::default().file("a.c", b"a").end();
    for zeros in [1, 511, 200_000] {
        assert_eq!(kept(&[gz(&plain), vec![0; zeros]].concat()), ["a.c"]);
    }
    refused(&[gz(&plain), vec![0; 9], b"x".to_vec()].concat(), "after the padding");
    refused(&[gz(&plain), vec![0; 70_000], gz(&plain)].concat(), "after the padding");
    refused(&[gz(&plain), b"x".to_vec()].concat(), "damaged");
}

/// What could be trained on and not written back is said while reading, by name.
#[test]
fn names_that_cannot_be_written_back_are_left_out_or_refused() {
    for length in [241, 244, 255] {
        let name = "n".repeat(length - 2) + ".c";
        let archive =
            Tar::default().long_name(name.as_bytes()).file("x", b"").file("a.c", b"").end();
        let (paths, left) = outcome(&archive, CorpusOptions::default()).unwrap();
        assert_eq!((paths, left.len()), (vec!["a.c".to_string()], 1));
        assert!(left[0].0.starts_with("nnnn") && left[0].1 == Reason::LongName, "{left:?}");
    }
    let both = [("a.c", "a.c/b.c"), ("a.c/b.c", "a.c"), ("d/a.c/b/c.c", "d/a.c")];
    for (first, second) in both {
        let archive = Tar::default().file(first, b"").file("x.c", b"").file(second, b"").end();
        refused(&archive, "a.c is both a file and a folder");
    }
    assert_eq!(kept(&Tar::default().file("a.c", b"").file("a.c.d/b.c", b"").end()).len(), 2);
}

#[test]
fn archive_rejects_path_traversal() {
    for name in ["../x.c", "a/../../x.c", "/etc/x.c", "a/..", "../x"] {
        refused(&Tar::default().file("a.c", b"").file(name, b"").end(), "leads out");
        refused(&Tar::default().long_name(name.as_bytes()).file("a.c", b"").end(), "leads out");
        let pax = Tar::default().pax(&[("path", name.as_bytes())]).file("a.c", b"");
        refused(&pax.end(), "leads out");
        refused(&Tar::default().file("a.c", b"").bare(name, b'2').end(), "leads out");
    }
    // Two dots in a name are only that.
    assert_eq!(kept(&Tar::default().file("a..b/..c.c", b"").end()), ["a..b/..c.c"]);
}

#[test]
fn links_and_devices_are_left_out() {
    let archive = Tar::default()
        .file("a.c", b"text")
        .bare("hard.c", b'1')
        .bare("soft.c", b'2')
        .bare("character.c", b'3')
        .bare("block.c", b'4')
        .bare("directory.c", b'5')
        .bare("pipe.c", b'6')
        .bare("unknown.c", b'Q')
        .bare("link_to_nothing_of_ours", b'2');
    let strict = CorpusOptions { strict: true, ..CorpusOptions::default() };
    let (kept, left_out) = outcome(&archive.end(), strict).unwrap();
    assert_eq!(kept, ["a.c"]);
    let expected = [
        left("hard.c", Reason::Link),
        left("soft.c", Reason::Link),
        left("character.c", Reason::Special),
        left("block.c", Reason::Special),
        left("pipe.c", Reason::Special),
        left("unknown.c", Reason::Special),
    ];
    assert_eq!(left_out, expected);
}

#[test]
fn sparse_files_are_left_out_however_large_they_say_they_are() {
    let mut header = tar::Header::new_gnu();
    header.set_path("holes.c").unwrap();
    header.set_size(512);
    header.set_entry_type(tar::EntryType::GNUSparse);
    let gnu = header.as_gnu_mut().unwrap();
    let octal = |field: &mut [u8; 12], value: u64| {
        field.copy_from_slice(format!("{value:011o}\0").as_bytes());
    };
    octal(&mut gnu.sparse[0].offset, (1 << 32) - 512);
    octal(&mut gnu.sparse[0].numbytes, 512);
    octal(&mut gnu.realsize, 1 << 32);
    header.set_cksum();
    let mut archive = Tar::default();
    archive.0.extend_from_slice(header.as_bytes());
    archive.0.extend_from_slice(&[b'x'; 512]);
    let archive = archive
        .pax(&[("GNU.sparse.major", b"1"), ("GNU.sparse.name", b"more.c")])
        .file("GNUSparseFile.0/more.c", b"1\n0\n512\n")
        .file("a.c", b"a");
    let (kept, left_out) = outcome(&archive.end(), CorpusOptions::default()).unwrap();
    assert_eq!(kept, ["a.c"]);
    let more = left("GNUSparseFile.0/more.c", Reason::Special);
    assert_eq!(left_out, [left("holes.c", Reason::Special), more]);
}

#[test]
fn bad_names_are_left_out_and_shown_escaped() {
    let long = [&[b'x'; 5000][..], b".c"].concat();
    let archive = Tar::default()
        .file("line\nbreak.c", b"")
        .raw(b"latin-\xfc.c", b'0', 0, b"")
        .pax(&[("path", b"nul\0.c")])
        .file("b.c", b"")
        .file("\x1b[2Jclear.c", b"")
        .long_name(&long)
        .file("c.c", b"")
        .file("a.c", b"")
        .end();
    let (kept, left_out) = outcome(&archive, CorpusOptions::default()).unwrap();
    assert_eq!(kept, ["a.c"]);
    assert!(left_out.iter().all(|(_, reason)| *reason == Reason::Name));
    let names: Vec<_> = left_out.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names[..4], ["line\\nbreak.c", "latin-\u{fffd}.c", "nul\\0.c", "\\u{1b}[2Jclear.c"]);
    assert!(names[4].len() < 200 && names[4].ends_with("..."));
    let strict = CorpusOptions { strict: true, ..CorpusOptions::default() };
    assert!(outcome(&archive, strict).is_err());
}

#[test]
fn archive_rejects_duplicate_names() {
    refused(&Tar::default().file("a.c", b"1").file("./a.c", b"2").end(), "two files");
}

#[test]
fn archive_rejects_bombs_while_unpacking() {
    let small = Limits { total: 1 << 20, file: 1 << 16, entries: 100, names: 1 << 10 };
    let zeros = vec![0; 1 << 16];

    // A file too many bytes long, honestly said.
    let over = vec![b'x'; (1 << 16) + 1];
    let large = Tar::default().file("a.c", &over).end();
    refused_with(&gz(&large), small, "more than 65536 bytes");
    // The same in a member that does not count: only the whole is limited.
    let large = Tar::default().file("a.bin", &over).file("a.c", b"").end();
    assert!(outcome(&large, CorpusOptions { limits: small, ..CorpusOptions::default() }).is_ok());

    let many = (0..20).fold(Tar::default(), |tar, i| tar.file(&format!("{i}.bin"), &zeros)).end();
    refused_with(&xz(&many), small, "more than 1048576 bytes");
    let many = (0..101).fold(Tar::default(), |tar, i| tar.bare(&format!("{i}"), b'5')).end();
    refused_with(&many, small, "more than 100 members");
    let named = |i| format!("{i:098}.c");
    let many = (0..20).fold(Tar::default(), |tar, i| tar.file(&named(i), b"")).end();
    refused_with(&many, small, "file names take more");

    // Sizes that are only claimed, up to the largest.
    for size in [1 << 21, 1 << 33, 1 << 62, u64::MAX >> 1] {
        refused_with(&Tar::default().raw(b"a.bin", b'0', size, b"x").end(), small, "archive");
        refused_with(&Tar::default().raw(b"a.c", b'0', size, b"x").end(), small, "archive");
    }
    // Far smaller than what it unpacks to, within all other limits, wherever the zeros are.
    let zeros = vec![0; 65 << 20];
    for name in ["a.bin", "a.c"] {
        let bomb = Tar::default()
            .file("0.c", b"0")
            .file(name, &zeros[..(64 << 20)])
            .file("b.bin", &zeros)
            .end();
        for packed in [xz(&bomb), gz(&bomb)] {
            refused(&packed, "more than 200 times");
        }
    }
    // Endless padding after the end.
    let mut padded = Tar::default().file("a.c", b"").end();
    padded.resize(4 << 20, 0);
    refused_with(&gz(&padded), small, "padding");
}

#[test]
fn archive_limits_header_bytes() {
    let silly = vec![b'x'; 3 << 20];
    for first in [Tar::default, || Tar::default().file("0.c", b"0")] {
        let named = first().long_name(&silly).file("a.c", b"").end();
        refused(&gz(&named), "more headers");
        let commented = first().pax(&[("comment", &silly)]).file("a.c", b"").end();
        refused(&gz(&commented), "more headers");
    }
    for kind in [b'L', b'K', b'x'] {
        refused(&Tar::default().raw(b"x", kind, 1 << 60, b"x").end(), "archive");
        refused(&Tar::default().raw(b"x", kind, u64::MAX >> 1, b"x").end(), "archive");
    }
    for size in
        ["99999999999999999999999", "-1", "18446744073709551615", "4611686018427387904", "x"]
    {
        let archive = Tar::default().pax(&[("size", size.as_bytes())]).file("a.c", b"text").end();
        // A number is believed, and refused; what is none is passed over.
        match outcome(&archive, CorpusOptions::default()) {
            Ok((kept, _)) => {
                assert_eq!(kept, ["a.c"]);
                assert!(size.parse::<u64>().is_err(), "{size}");
            }
            Err(why) => assert!(kind_of(&why).is_some()),
        }
    }
    // Long names without a member, or two for one.
    refused(&Tar::default().file("a.c", b"").long_name(b"b.c").end(), "archive");
    refused(&Tar::default().long_name(b"b.c").long_name(b"c.c").file("a.c", b"").end(), "archive");
}

#[test]
fn archive_limits_xz_memory() {
    let mut bytes = xz(&Tar::default().file("a.c", b"").end());
    // The block header at byte 12: length/4 - 1, flags, filter 0x21, one byte of properties, and
    // this is the byte: the dictionary's size. 40 is 4 GiB.
    assert_eq!(bytes[12..16], [2, 0, 0x21, 1]);
    bytes[16] = 40;
    let mut crc = flate2::Crc::new();
    crc.update(&bytes[12..20]);
    bytes[20..24].copy_from_slice(&crc.sum().to_le_bytes());
    refused(&bytes, "memory");
}

#[test]
fn truncated_archives_are_rejected() {
    let text: Vec<u8> = (0..3000u32).map(|i| b'a' + (i * i % 23) as u8).collect();
    let plain = Tar::default().file("a.c", &text).file("b.c", b"b").file("c.o", b"cc").end();
    for (bytes, ends_at) in [(plain.clone(), plain.len() - 1024), (gz(&plain), 0), (xz(&plain), 0)]
    {
        for cut in (0..bytes.len() - 1).step_by(7).chain([512, 1024, bytes.len() - 1]) {
            let result = outcome(&bytes[..cut.min(bytes.len() - 1)], CorpusOptions::default());
            // A plain tar is whole once its first end mark, one block of zeros, is there.
            if ends_at == 0 || cut < ends_at + 512 {
                let why = result.expect_err("a cut archive is refused");
                assert!(
                    kind_of(&why) == Some(ErrorKind::Data) && !why.to_string().contains('\n'),
                    "{why:#}"
                );
            }
        }
    }
    // Not even where we would have stopped with the file that is cut.
    let first = CorpusOptions { limit: Some(1), ..CorpusOptions::default() };
    assert!(outcome(&plain[..2000], first.clone()).is_err());
    assert_eq!(outcome(&plain[..4000], first).unwrap().0, ["a.c"]);
    refused(&plain[..plain.len() - 1024], "no end-of-archive mark");
    refused(&[&plain[..], b"more"].concat(), "after the end");
}

#[test]
fn damage_is_found_or_harmless() {
    let text: Vec<u8> = (0..3000u32).map(|i| b'a' + (i * i % 23) as u8).collect();
    let plain = Tar::default().file("a.c", &text).file("b.c", b"b").end();
    for bytes in [gz(&plain), xz(&plain)] {
        for at in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1 << (at % 8);
            // What is not covered by a checksum, such as gzip's date, does not matter.
            if let Ok((kept, _)) = outcome(&bytes, CorpusOptions::default()) {
                assert_eq!(kept, ["a.c", "b.c"]);
                assert!(at < 12, "byte {at} was damaged and nobody noticed");
            }
        }
    }
    let mut middle = gz(&plain);
    let at = middle.len() / 2;
    middle[at] ^= 0x10;
    refused(&middle, "by byte");
}

#[test]
fn non_archives_are_rejected() {
    refused(b"", "archive");
    refused(b"int main(void) { return 0; }\n", "is it an archive?");
    refused(&[b"PK\x03\x04", &[7; 2000][..]].concat(), "is a zip file");
    refused(&gz(b"just text"), "archive");
    refused(&xz(b""), "archive");
    refused(&gz(&[0x5a; 4096]), "archive");
}
