//! The syntax tree to code: every name resolved, every constant in a register of its own.

use std::collections::HashMap;

use crate::code::{Code, Decoded};
use crate::decode_ops;
use crate::decoder::{Decoder, ModuleScope, Signature};
use crate::parse::{self, Ast, Location, Result, Statement, error};

pub(crate) fn decode(text: &str) -> Result<Decoded> {
    let ast = parse::parse(text)?;
    let mut module = ModuleScope::default();
    for variable in &ast.variables {
        module.variable(variable)?;
    }
    let defined = ast.functions.iter().filter(|f| f.body.is_some());
    for (index, function) in defined.clone().enumerate() {
        if module.functions.insert(function.name, index as u32).is_some() {
            return error(function.line, format!("`{}` is defined twice", function.name));
        }
    }
    let signatures: Vec<_> = defined.clone().map(Signature::of).collect::<Result<_>>()?;
    let functions = defined
        .zip(&signatures)
        .map(|(f, signature)| function(f, signature, &signatures, &mut module))
        .collect::<Result<_>>()?;
    let (variables, opcodes) = module.finish();
    let Ast { files, target, .. } = ast;
    Ok(Decoded {
        functions,
        variables,
        files: files.into_iter().map(|(number, name)| (number, name.to_owned())).collect(),
        opcodes,
        target: target.to_owned(),
    })
}

fn function<'a>(
    function: &parse::Function<'a>,
    signature: &Signature,
    signatures: &[Signature],
    module: &mut ModuleScope<'a>,
) -> Result<Code> {
    let mut decoder = Decoder::new(function, signature, signatures, module);
    let mut locations = Locations::default();
    let body = function.body.as_deref().unwrap_or_default();
    decoder.collect_branch_targets(body);
    for statement in body {
        match statement {
            Statement::Open(line) => decoder.open_scope(*line)?,
            Statement::Close => decoder.close_scope(),
            Statement::Label(name, line) => decoder.label(name, *line)?,
            Statement::Variable(variable) => decoder.variable(variable)?,
            Statement::Loc { at, inlined_at } => {
                decoder.set_location(locations.enter(*at, *inlined_at));
            }
            Statement::BranchTargets(_) => {}
            Statement::Instruction(instruction) => {
                decoder.start_instruction(instruction)?;
                let mut parts = instruction.opcode.split('.');
                let name = parts.next().unwrap_or_default();
                let mods: Vec<&str> = parts.collect();
                decode_ops::decode(&mut decoder, name, &mods, &instruction.operands)?;
            }
        }
    }
    decoder.finish(function, signature, locations.list)
}

/// Follows `.loc` directives. An inlined one names the place in its caller, which, if it was
/// inlined itself, was named by a directive before.
#[derive(Default)]
struct Locations {
    list: Vec<(Location, Option<Location>)>,
    outer: HashMap<Location, Location>,
}

impl Locations {
    fn enter(&mut self, at: Location, inlined_at: Option<Location>) -> u32 {
        if self.list.is_empty() {
            // Index 0 is "no location yet".
            self.list.push((Location { file: 0, line: 0, column: 0 }, None));
        }
        let outermost = inlined_at.map(|place| self.outer.get(&place).copied().unwrap_or(place));
        match outermost {
            Some(place) => self.outer.insert(at, place),
            None => self.outer.remove(&at),
        };
        self.list.push((at, outermost));
        self.list.len() as u32 - 1
    }
}
