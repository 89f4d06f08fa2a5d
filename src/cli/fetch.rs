//! `laam fetch`: a kernel archive, downloaded and checked.

use std::io::Write;

use clap::Args;
use serde_json::json;

use super::output::{print_json, stdout};
use super::progress::Downloads;
use super::{Outcome, source};
use crate::corpus::{MIRROR, public_url};
use crate::schema::versioned;

/// Download and check a kernel archive, and print where it is.
///
/// The archive is kept in LAAM_CACHE, else XDG_CACHE_HOME/laam, else ~/.cache/laam, and found there
/// the next time. A download that broke off goes on where it stopped. The archive is checked against
/// the server's sha256sums.asc and refused if it differs. No hash is pinned in laam, and the list's PGP
/// signature is not verified: the list is trusted as the server and its TLS certificate are.
#[derive(Args, Debug)]
#[command(after_help = "Example: laam fetch --version v1.0/1.0")]
pub struct FetchArgs {
    /// The kernel's folder and number on the server, like v1.0/1.0 or v6.x/6.9.4
    #[arg(id = "kernel_version", long = "version", value_name = "V")]
    version: String,
    /// The server: the address of the folder that holds v1.0
    #[arg(long, value_name = "URL", default_value = MIRROR)]
    mirror_uri: String,
    /// Accept an archive that the server has no checksum of
    #[arg(long)]
    unverified: bool,
    /// Print the result, or the error, as one JSON object on stdout
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &FetchArgs) -> anyhow::Result<Outcome> {
    let release = source::release(&arguments.version, &arguments.mirror_uri, arguments.unverified)?;
    let mut downloads = Downloads::default();
    let fetched = release.fetch(&mut |event| downloads.show(event))?;
    if arguments.json {
        print_json(&versioned(json!({
            "path": fetched.path.to_string_lossy(),
            "url": public_url(&fetched.url),
            "retrieved": fetched.retrieved,
            "sha256": fetched.sha256,
            "checksum_confirmed": fetched.checksum_confirmed,
        })));
    } else {
        writeln!(stdout(), "{}", fetched.path.display())?;
    }
    Ok(Outcome::Done)
}
