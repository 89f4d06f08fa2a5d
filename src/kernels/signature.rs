//! Names, parameters and block limits of kernels, parsed from PTX. `build.rs` compiles this file too: it turns them
//! into the tables that `src/kernels.rs` includes.

/// A `__global__` function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    /// `rms_norm_bf16`
    pub name: String,
    /// Size of each parameter in bytes, in order.
    pub parameters: Vec<usize>,
    /// Most threads per block: of `__launch_bounds__`, else those of every GPU.
    pub max_threads: usize,
}

impl Signature {
    /// The signatures of a module's entries, in order.
    pub fn of_ptx(ptx: &str) -> Vec<Signature> {
        let entry = |text: &str| {
            let (name, rest) = text.split_once('(')?;
            let (parameters, rest) = rest.split_once(')')?;
            let directives = rest.split_once('{')?.0;
            let bounds = directives.split_once(".maxntid").map(|(_, bounds)| {
                let sizes = bounds.lines().next().unwrap_or_default().split(',');
                sizes.filter_map(|size| size.trim().parse::<usize>().ok()).product()
            });
            Some(Signature {
                name: name.trim().to_string(),
                parameters: parameters.split(',').filter_map(parameter_bytes).collect(),
                max_threads: bounds.unwrap_or(1024),
            })
        };
        ptx.split(".visible .entry ").skip(1).filter_map(entry).collect()
    }

    /// The text of a line that [`Signature::parse`] reads.
    pub fn line(&self) -> String {
        let parameters: Vec<String> = self.parameters.iter().map(usize::to_string).collect();
        format!("{}\t{}\t{}", self.name, self.max_threads, parameters.join(","))
    }

    /// Parses a line.
    pub fn parse(line: &str) -> Option<Signature> {
        let mut fields = line.split('\t');
        let (name, max_threads, sizes) = (fields.next()?, fields.next()?, fields.next()?);
        let sizes = sizes.split(',').filter(|size| !size.is_empty());
        Some(Signature {
            name: name.to_string(),
            parameters: sizes.map(|size| size.parse().ok()).collect::<Option<_>>()?,
            max_threads: max_threads.parse().ok()?,
        })
    }

    /// Family, numbers and dtype of the name: `flash_attention_64_bf16` is the instance of
    /// `flash_attention` for 64 and bf16.
    pub fn instance(&self) -> (&str, Vec<usize>, Option<&'static str>) {
        let dtype = ["f32", "bf16", "f16"]
            .into_iter()
            .find_map(|dtype| Some((dtype, self.name.strip_suffix(dtype)?.strip_suffix('_')?)));
        let (dtype, mut family) = match dtype {
            Some((dtype, family)) => (Some(dtype), family),
            None => (None, self.name.as_str()),
        };
        let mut numbers = Vec::new();
        while let Some((rest, number)) = family.rsplit_once('_')
            && let Ok(number) = number.parse()
        {
            numbers.insert(0, number);
            family = rest;
        }
        (family, numbers, dtype)
    }
}

/// Bytes of a parameter by its declaration: `.param .u64 .ptr .align 1 name_param_0`, or of a struct
/// `.param .align 8 .b8 name_param_0[24]`.
fn parameter_bytes(declaration: &str) -> Option<usize> {
    let mut words = declaration.split_whitespace().skip(1);
    let bits = |word: &str| word.trim_start_matches(|c: char| !c.is_ascii_digit()).parse();
    let bits: usize = words.find_map(|word| match word {
        ".align" => None,
        word if word.starts_with('.') => bits(word).ok(),
        _ => None,
    })?;
    let count = declaration.split_once('[').and_then(|(_, n)| n.split(']').next()?.parse().ok());
    Some(bits / 8 * count.unwrap_or(1usize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_are_read_from_ptx_and_from_their_lines() {
        let ptx = ".visible .entry two_16_4_bf16(\n\t.param .align 8 .b8 a_param_0[24],\n\t.param .f32 \
                   a_param_1\n)\n.maxntid 32, 8, 1\n.minnctapersm 2\n{\n\tret;\n}\n.visible .entry \
                   none()\n{\n}\n";
        let [two, none] = &Signature::of_ptx(ptx)[..] else { panic!() };
        assert_eq!((two.parameters.as_slice(), two.max_threads), (&[24, 4][..], 256));
        assert_eq!(two.instance(), ("two", vec![16, 4], Some("bf16")));
        assert_eq!((none.parameters.as_slice(), none.max_threads), (&[][..], 1024));
        assert_eq!(none.instance(), ("none", vec![], None));
        for signature in [two, none] {
            assert_eq!(Signature::parse(&signature.line()).as_ref(), Some(signature));
        }
        assert_eq!(Signature::parse("a\t256"), None);
        assert_eq!(Signature::parse("a\t256\t8,x"), None);
    }
}
