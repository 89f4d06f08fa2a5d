//! One function on its way to code: scopes, names, constants, branches. `decode_ops` asks it for
//! the registers of operands and emits instructions into it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use crate::catalogue;
use crate::cfg::{self, Flow};
use crate::code::{Code, GlobalVariable, MaskOf, Origin, Param, Source, Special};
use crate::convert::Scalar;
use crate::op::{Address, Callee, Instr, NONE, Op, ParamSlot};
use crate::parse::{self, Location, Number, Operand, Result, Statement, Variable, error};
use crate::registers::{File, Form, Slots};

/// Limits of a GPU, which also bound what a text can make the simulator allocate, in bytes.
const MAX_LOCAL: u64 = 512 << 10;
const MAX_SHARED_VARIABLE: u64 = 1 << 20;
/// All `.global` and `.const` variables of a module together, in bytes.
const MAX_GLOBAL: u64 = 1 << 30;
const MAX_PARAMS: u64 = 32764;
const MAX_CALL_PARAMS: u64 = 1 << 20;
/// Limits of the simulator, which keep its work linear in the length of a text.
const MAX_SCOPES: usize = 256;
const MAX_BRANCH_TARGETS: usize = 1 << 20;
/// Registers of one file in a function, constants among them.
const MAX_SLOTS: u32 = 1 << 16;
/// Digits of the largest register number.
const MAX_DIGITS: usize = 20;

/// Names that the whole module knows.
#[derive(Default)]
pub(crate) struct ModuleScope<'a> {
    variables: Vec<GlobalVariable>,
    /// Bytes of the `.global` and `.const` variables together.
    global_bytes: u64,
    names: HashMap<&'a str, u32>,
    pub functions: HashMap<&'a str, u32>,
    opcodes: HashMap<&'a str, u32>,
}

fn scalar(variable: &Variable) -> Result<Scalar> {
    Scalar::of(variable.ty).map_or_else(
        || {
            error(
                variable.line,
                format!("type `.{}` of `{}` is not modeled", variable.ty, variable.name),
            )
        },
        Ok,
    )
}

/// Size and alignment of a variable in memory.
fn extent(variable: &Variable, limit: u64) -> Result<(u64, u64)> {
    let element = u64::from(scalar(variable)?.bits() / 8);
    let align = variable.align.unwrap_or(element);
    if !align.is_power_of_two() || align > 1 << 16 {
        return error(variable.line, format!("alignment {align} is not a small power of two"));
    }
    let size = variable.elements.unwrap_or(0).checked_mul(element);
    match size.filter(|&size| size <= limit) {
        Some(size) => Ok((size, align)),
        None => error(
            variable.line,
            format!("`{}` is larger than the {limit} bytes a GPU allows there", variable.name),
        ),
    }
}

impl<'a> ModuleScope<'a> {
    /// Variables, and opcodes by number.
    pub fn finish(self) -> (Vec<GlobalVariable>, Vec<String>) {
        let mut opcodes: Vec<_> = self.opcodes.into_iter().collect();
        opcodes.sort_by_key(|&(_, index)| index);
        (self.variables, opcodes.into_iter().map(|(name, _)| name.to_owned()).collect())
    }

    /// Number of an opcode.
    fn opcode(&mut self, opcode: &'a str) -> Option<u32> {
        let known = self.opcodes.len() as u32;
        match self.opcodes.entry(opcode) {
            Entry::Occupied(entry) => Some(*entry.get()),
            Entry::Vacant(entry) => catalogue::forms()
                .contains(&catalogue::form_of(opcode))
                .then(|| *entry.insert(known)),
        }
    }

    /// Declares a variable that is not a function's own.
    pub fn variable(&mut self, variable: &Variable<'a>) -> Result<u32> {
        let shared = variable.space == parse::StateSpace::Shared;
        let limit = if shared { MAX_SHARED_VARIABLE } else { MAX_GLOBAL };
        let (size, align) = extent(variable, limit)?;
        if variable.external && !shared {
            return error(
                variable.line,
                format!("`{}` is defined in another module; linking is not modeled", variable.name),
            );
        }
        let mut init = Vec::new();
        let element = scalar(variable)?;
        for number in &variable.init {
            let bits = literal(*number, element.file(), element == Scalar::F32);
            init.extend_from_slice(&bits.to_le_bytes()[..element.bits() as usize / 8]);
        }
        let size = variable.elements.map(|_| size);
        // `name[] = {...}` is as long as what it holds.
        let size = if size.is_none() && !init.is_empty() { Some(init.len() as u64) } else { size };
        if size.is_none() && !(shared && variable.external) {
            return error(variable.line, format!("`{}` has no size", variable.name));
        }
        if init.len() as u64 > size.unwrap_or(0) {
            return error(variable.line, format!("too many values for `{}`", variable.name));
        }
        if !shared {
            self.global_bytes += size.unwrap_or(0);
            if self.global_bytes > MAX_GLOBAL {
                return error(
                    variable.line,
                    format!("more than {MAX_GLOBAL} bytes of `.global` and `.const` variables"),
                );
            }
        }
        let index = self.variables.len() as u32;
        self.variables.push(GlobalVariable {
            name: variable.name.to_owned(),
            shared,
            size,
            align,
            init,
        });
        self.names.insert(variable.name, index);
        Ok(index)
    }
}

/// The bits of a literal in a register of a file.
fn literal(number: Number, file: File, float: bool) -> u64 {
    match (number, file) {
        (Number::Int(value), File::R32) if float => u64::from((value as f32).to_bits()),
        (Number::Int(value), File::R64) if float => (value as f64).to_bits(),
        (Number::Int(value), File::R64 | File::R32) => value as u64,
        (Number::Int(value), File::Pred) => u64::from(value != 0),
        (Number::F32(bits), File::R64) if float => f64::from(f32::from_bits(bits)).to_bits(),
        (Number::F32(bits), _) => bits.into(),
        (Number::F64(bits), File::R64) => bits,
        (Number::F64(bits), _) => u64::from((f64::from_bits(bits) as f32).to_bits()),
    }
}

/// Where a function's parameters lie.
pub(crate) struct Signature {
    params: Vec<Param>,
    formals: Vec<ParamSlot>,
    results: Vec<ParamSlot>,
    bytes: u32,
}

impl Signature {
    pub fn of(function: &parse::Function) -> Result<Signature> {
        let mut at = 0u64;
        let mut params = Vec::new();
        let mut place = |variable: &Variable| {
            let (size, align) = extent(variable, MAX_PARAMS)?;
            at = at.next_multiple_of(align);
            let slot = ParamSlot { offset: at as u32, size: size as u32 };
            params.push(Param {
                name: variable.name.to_owned(),
                ty: variable.ty.to_owned(),
                size: size as usize,
                align: align as usize,
                offset: at as usize,
            });
            at += size;
            if at > MAX_PARAMS {
                return error(variable.line, "more parameters than a GPU allows");
            }
            Ok(slot)
        };
        let formals = function.params.iter().map(&mut place).collect::<Result<_>>()?;
        let results = function.returns.iter().map(&mut place).collect::<Result<_>>()?;
        // Words, since frames keep parameters as lanes of words.
        Ok(Signature { params, formals, results, bytes: at.next_multiple_of(8) as u32 })
    }
}

#[derive(Clone, Copy)]
enum Symbol {
    Register(File, u32),
    Local(i64),
    Param(ParamSlot),
    Variable(u32),
}

#[derive(Default)]
struct Scope<'a> {
    number: usize,
    symbols: HashMap<&'a str, Symbol>,
    /// File and count of `%r<91>`, by prefix.
    ranges: HashMap<&'a str, (File, u64)>,
    targets: HashMap<&'a str, Vec<&'a str>>,
}

/// One function being decoded.
pub(crate) struct Decoder<'a, 'm> {
    module: &'m mut ModuleScope<'a>,
    signatures: &'m [Signature],
    entry: bool,
    scopes: Vec<Scope<'a>>,
    opened: usize,
    labels: HashMap<(usize, &'a str), u32>,
    constants: HashMap<(File, Source), u32>,
    slots: [u32; 3],
    own_param_bytes: u32,
    param_bytes: u32,
    local_bytes: u64,
    registers: u64,
    /// Branch targets to resolve once all labels are known: the scopes they are named in.
    branches: Vec<(usize, Vec<usize>, Vec<&'a str>)>,
    branch_targets: usize,
    instrs: Vec<Instr>,
    origins: Vec<Origin>,
    calls: Vec<u32>,
    guard: (u32, bool),
    origin: Origin,
}

fn file_index(file: File) -> usize {
    match file {
        File::Pred => 0,
        File::R32 => 1,
        File::R64 => 2,
    }
}
impl<'a, 'm> Decoder<'a, 'm> {
    pub fn new(
        function: &parse::Function<'a>,
        signature: &Signature,
        signatures: &'m [Signature],
        module: &'m mut ModuleScope<'a>,
    ) -> Decoder<'a, 'm> {
        let mut scope = Scope::default();
        let params = function.params.iter().zip(&signature.formals);
        for (variable, slot) in params.chain(function.returns.iter().zip(&signature.results)) {
            scope.symbols.insert(variable.name, Symbol::Param(*slot));
        }
        Decoder {
            module,
            signatures,
            entry: function.entry,
            scopes: vec![scope],
            opened: 0,
            labels: HashMap::new(),
            constants: HashMap::new(),
            slots: [2, 0, 0],
            own_param_bytes: signature.bytes,
            param_bytes: signature.bytes,
            local_bytes: 0,
            registers: 0,
            branches: Vec::new(),
            branch_targets: 0,
            instrs: Vec::new(),
            origins: Vec::new(),
            calls: Vec::new(),
            guard: (0, false),
            origin: Origin { line: function.line, opcode: 0, location: 0 },
        }
    }
}

impl<'a> Decoder<'a, '_> {
    /// Reads the `.branchtargets` of a body: `brx.idx` may come before the table it names.
    pub fn collect_branch_targets(&mut self, body: &[Statement<'a>]) {
        let mut label = None;
        for statement in body {
            match statement {
                Statement::Label(name, _) => label = Some(*name),
                Statement::BranchTargets(list) => {
                    if let Some(name) = label.take() {
                        self.scopes[0].targets.insert(name, list.clone());
                    }
                }
                _ => label = None,
            }
        }
    }

    pub fn open_scope(&mut self, line: u32) -> Result<()> {
        if self.scopes.len() > MAX_SCOPES {
            return error(line, format!("scopes nested more than {MAX_SCOPES} deep"));
        }
        self.opened += 1;
        self.scopes.push(Scope { number: self.opened, ..Scope::default() });
        Ok(())
    }

    pub fn close_scope(&mut self) {
        self.scopes.pop();
    }

    pub fn label(&mut self, name: &'a str, line: u32) -> Result<()> {
        let scope = self.scopes.last().map_or(0, |scope| scope.number);
        let at = self.instrs.len() as u32;
        if self.labels.insert((scope, name), at).is_some() {
            return error(line, format!("label `{name}` is defined twice"));
        }
        Ok(())
    }

    pub fn set_location(&mut self, location: u32) {
        self.origin.location = location;
    }

    /// Code of the function, whose end is a return.
    pub fn finish(
        mut self,
        function: &parse::Function<'a>,
        signature: &Signature,
        locations: Vec<(Location, Option<Location>)>,
    ) -> Result<Code> {
        self.guard = (0, false);
        self.origin.opcode = self.module.opcode("ret").unwrap_or(0);
        self.emit(Op::Return);
        self.resolve_branches()?;
        if self.slots.iter().any(|&count| count > MAX_SLOTS) {
            return error(
                function.line,
                format!("`{}` uses more than {MAX_SLOTS} registers", function.name),
            );
        }
        let constants = self.constants.into_iter();
        Ok(Code {
            name: function.name.to_owned(),
            entry: function.entry,
            instrs: self.instrs,
            origins: self.origins,
            locations,
            slots: self.slots,
            constants: constants.map(|((file, source), slot)| (file, slot, source)).collect(),
            params: if function.entry { signature.params.clone() } else { Vec::new() },
            formals: signature.formals.clone(),
            results: signature.results.clone(),
            param_bytes: self.param_bytes,
            local_bytes: self.local_bytes as u32,
            required_block: function.required_block,
            max_block: function.max_block,
            registers: self.registers.min(u64::from(u32::MAX)) as u32,
            calls: self.calls,
        })
    }

    /// Declares a variable of the innermost scope.
    pub fn variable(&mut self, variable: &Variable<'a>) -> Result<()> {
        let symbol = match variable.space {
            parse::StateSpace::Reg => {
                let file = match variable.ty {
                    "pred" => File::Pred,
                    _ => scalar(variable)?.file(),
                };
                self.registers = self.registers.saturating_add(variable.range.unwrap_or(1));
                if let Some(count) = variable.range {
                    let scope = self.scopes.last_mut().expect("a body has a scope");
                    scope.ranges.insert(variable.name, (file, count));
                    return Ok(());
                }
                Symbol::Register(file, self.slot(file))
            }
            parse::StateSpace::Local => {
                let (size, align) = extent(variable, MAX_LOCAL)?;
                let at = self.local_bytes.next_multiple_of(align.max(4));
                self.local_bytes = at + size.next_multiple_of(4);
                if self.local_bytes > MAX_LOCAL {
                    return error(variable.line, "more local memory than a GPU allows");
                }
                Symbol::Local(at as i64)
            }
            parse::StateSpace::Param => {
                let (size, align) = extent(variable, MAX_PARAMS)?;
                let offset = u64::from(self.param_bytes).next_multiple_of(align.max(8));
                let end = (offset + size).next_multiple_of(8);
                if end > MAX_CALL_PARAMS {
                    return error(variable.line, "too many call parameters");
                }
                self.param_bytes = end as u32;
                Symbol::Param(ParamSlot { offset: offset as u32, size: size as u32 })
            }
            _ => Symbol::Variable(self.module.variable(variable)?),
        };
        let scope = self.scopes.last_mut().expect("a body has a scope");
        scope.symbols.insert(variable.name, symbol);
        Ok(())
    }

    /// A new register.
    pub fn slot(&mut self, file: File) -> u32 {
        let next = &mut self.slots[file_index(file)];
        *next += 1;
        *next - 1
    }

    pub fn fail<T>(&self, message: impl Into<String>) -> Result<T> {
        error(self.origin.line, message)
    }

    fn symbol(&mut self, name: &'a str) -> Option<Symbol> {
        for at in (0..self.scopes.len()).rev() {
            if let Some(symbol) = self.scopes[at].symbols.get(name) {
                return Some(*symbol);
            }
            let prefix = name.trim_end_matches(|c: char| c.is_ascii_digit());
            // A range's prefix may itself hold digits, so every split is tried.
            for split in prefix.len().max(name.len().saturating_sub(MAX_DIGITS))..name.len() {
                let (prefix, number) = name.split_at(split);
                let (Ok(number), false) =
                    (number.parse::<u64>(), number.len() > 1 && number.starts_with('0'))
                else {
                    continue;
                };
                if let Some(&(file, count)) = self.scopes[at].ranges.get(prefix)
                    && number < count
                {
                    let symbol = Symbol::Register(file, self.slot(file));
                    self.scopes[at].symbols.insert(name, symbol);
                    return Some(symbol);
                }
            }
        }
        self.module.names.get(name).map(|&index| Symbol::Variable(index))
    }

    fn constant(&mut self, file: File, source: Source) -> u32 {
        if let Some(&slot) = self.constants.get(&(file, source)) {
            return slot;
        }
        let slot = self.slot(file);
        self.constants.insert((file, source), slot);
        slot
    }

    /// The slot that always holds a number.
    pub fn number(&mut self, file: File, value: u64) -> u32 {
        let value = if file == File::R32 { u64::from(value as u32) } else { value };
        self.constant(file, Source::Const(value))
    }

    pub fn emit(&mut self, op: Op) {
        let (guard, negated) = self.guard;
        self.instrs.push(Instr { op, guard, negated });
        self.origins.push(self.origin);
    }

    /// The file of a register operand, if it is one.
    pub fn register_file(&mut self, operand: &Operand<'a>) -> Option<File> {
        match operand {
            Operand::Name(name, 0) => match self.symbol(name)? {
                Symbol::Register(file, _) => Some(file),
                _ => None,
            },
            _ => None,
        }
    }

    /// A source operand in a register of the file; `float` says how literals are meant.
    pub fn source(&mut self, operand: &Operand<'a>, file: File, float: bool) -> Result<u32> {
        match operand {
            Operand::Number(number) => Ok(self.number(file, literal(*number, file, float))),
            Operand::Not(name) => {
                let a = self.source(&Operand::Name(name, 0), File::Pred, false)?;
                let d = self.slot(File::Pred);
                let Some(form) = crate::int::form("not", &["pred"]) else {
                    return self.fail("no form for a negated predicate");
                };
                self.emit(Op::Alu(form.run, Slots { d, s: [a, 0, 0, 0] }));
                Ok(d)
            }
            Operand::Name(name, offset) => {
                if let Some(symbol) = self.symbol(name) {
                    return self.symbol_source(name, symbol, *offset, file);
                }
                if file == File::R32
                    && let Some(special) = special(name)
                {
                    return Ok(self.constant(file, Source::Special(special)));
                }
                if *name == "WARP_SZ" {
                    return Ok(self.number(file, 32));
                }
                self.fail(format!("unknown name `{name}`"))
            }
            _ => self.fail("this operand is of the wrong kind"),
        }
    }

    fn symbol_source(
        &mut self,
        name: &str,
        symbol: Symbol,
        offset: i64,
        file: File,
    ) -> Result<u32> {
        match symbol {
            Symbol::Register(own, slot) if offset == 0 => {
                if own == file {
                    return Ok(slot);
                }
                let wanted = match file {
                    File::Pred => "a predicate",
                    File::R32 => "of at most 32 bits",
                    File::R64 => "of 64 bits",
                };
                self.fail(format!("register `{name}` is not {wanted}"))
            }
            Symbol::Register(..) => self.fail("a register takes no offset here"),
            _ if file == File::Pred => self.fail(format!("`{name}` is not a predicate")),
            Symbol::Local(at) => Ok(self.constant(file, Source::Local(at.wrapping_add(offset)))),
            Symbol::Param(slot) => {
                Ok(self.number(file, (i64::from(slot.offset).wrapping_add(offset)) as u64))
            }
            Symbol::Variable(index) => Ok(self.constant(file, Source::Variable(index, offset))),
        }
    }

    /// A destination register of the file; `_` is a register nobody reads.
    pub fn destination(&mut self, operand: &Operand<'a>, file: File) -> Result<u32> {
        match operand {
            Operand::Name("_", 0) => Ok(self.slot(file)),
            Operand::Name(name, 0) => match self.symbol(name) {
                Some(Symbol::Register(own, slot)) if own == file => Ok(slot),
                Some(Symbol::Register(..)) => {
                    self.fail(format!("register `{name}` has the wrong width here"))
                }
                _ => self.fail(format!("`{name}` is not a register")),
            },
            _ => self.fail("the destination is not a register"),
        }
    }

    /// The base and offset of an address operand.
    pub fn address(&mut self, operand: &Operand<'a>) -> Result<Address> {
        match operand {
            Operand::Address(name, offset) => match self.symbol(name) {
                Some(Symbol::Register(File::R32, base)) => {
                    Ok(Address { base, wide: false, offset: *offset })
                }
                Some(Symbol::Register(File::R64, base)) => {
                    Ok(Address { base, wide: true, offset: *offset })
                }
                Some(Symbol::Register(File::Pred, _)) => self.fail("a predicate is not an address"),
                Some(symbol) => {
                    let base = self.symbol_source(name, symbol, 0, File::R64)?;
                    Ok(Address { base, wide: true, offset: *offset })
                }
                None => self.fail(format!("unknown name `{name}`")),
            },
            Operand::AbsoluteAddress(offset) => {
                Ok(Address { base: self.number(File::R64, 0), wide: true, offset: *offset })
            }
            _ => self.fail("expected an address in brackets"),
        }
    }

    /// Bytes of the kernel's own parameters; those of its calls lie after them.
    pub fn kernel_param_bytes(&self) -> u32 {
        self.own_param_bytes
    }

    pub fn is_entry(&self) -> bool {
        self.entry
    }

    /// A call-scope parameter by name.
    pub fn parameter(&mut self, operand: &Operand<'a>) -> Result<ParamSlot> {
        if let Operand::Name(name, 0) = operand
            && let Some(Symbol::Param(slot)) = self.symbol(name)
        {
            return Ok(slot);
        }
        self.fail("calls take `.param` variables only")
    }

    /// What a call names, checked against its signature.
    pub fn callee(
        &mut self,
        operand: &Operand<'a>,
        arguments: &[ParamSlot],
        results: &[ParamSlot],
    ) -> Result<Callee> {
        let Operand::Name(name, 0) = operand else { return self.fail("a call needs a function") };
        match *name {
            "vprintf" => return Ok(Callee::Print),
            "__assertfail" => return Ok(Callee::AssertFail),
            _ => {}
        }
        if let Some(Symbol::Register(..)) = self.symbol(name) {
            return self.fail("calls through a register are not modeled");
        }
        let Some(&index) = self.module.functions.get(name) else {
            return self.fail(format!("`{name}` is not defined in this module"));
        };
        let signature = &self.signatures[index as usize];
        let fits = |given: &[ParamSlot], wanted: &[ParamSlot]| {
            given.len() == wanted.len() && given.iter().zip(wanted).all(|(g, w)| g.size == w.size)
        };
        if !fits(arguments, &signature.formals) || !fits(results, &signature.results) {
            return self.fail(format!("the parameters of this call do not fit `{name}`"));
        }
        self.calls.push(index);
        Ok(Callee::Function(index))
    }

    /// Emits a branch whose labels are resolved at the end.
    pub fn emit_branch(&mut self, op: Op, labels: Vec<&'a str>) -> Result<()> {
        self.branch_targets += labels.len();
        if self.branch_targets > MAX_BRANCH_TARGETS {
            return self.fail(format!("more than {MAX_BRANCH_TARGETS} branch targets"));
        }
        let scopes = self.scopes.iter().map(|scope| scope.number).collect();
        self.branches.push((self.instrs.len(), scopes, labels));
        self.emit(op);
        Ok(())
    }

    /// The labels of a `.branchtargets` table.
    pub fn branch_table(&self, name: &str) -> Option<Vec<&'a str>> {
        self.scopes[0].targets.get(name).cloned()
    }

    fn resolve_branches(&mut self) -> Result<()> {
        for (at, scopes, labels) in std::mem::take(&mut self.branches) {
            let mut found = Vec::new();
            for label in labels {
                let target =
                    scopes.iter().rev().find_map(|&scope| self.labels.get(&(scope, label)));
                let Some(&target) = target else {
                    return error(
                        self.origins[at].line,
                        format!("label `{label}` is not defined here"),
                    );
                };
                found.push(target);
            }
            match &mut self.instrs[at].op {
                Op::Branch { target, .. } => *target = found[0],
                Op::BranchIndex { targets, .. } => *targets = found.into(),
                _ => {}
            }
        }
        let instrs = &self.instrs;
        let joins = cfg::reconvergence(instrs.len(), |at| {
            let guarded = instrs[at].guard != 0;
            match &instrs[at].op {
                Op::Branch { target, .. } => Flow::Branch(std::slice::from_ref(target), guarded),
                Op::BranchIndex { targets, .. } => Flow::Branch(targets, guarded),
                Op::Return | Op::Exit | Op::Trap => Flow::Leave(guarded),
                _ => Flow::Next,
            }
        });
        for (at, meet) in joins {
            if let Op::Branch { join, .. } | Op::BranchIndex { join, .. } = &mut self.instrs[at].op
            {
                *join = meet;
            }
        }
        Ok(())
    }

    /// Begins an instruction: its line, its opcode, its guard.
    pub fn start_instruction(&mut self, instruction: &parse::Instruction<'a>) -> Result<()> {
        self.origin.line = instruction.line;
        let Some(opcode) = self.module.opcode(instruction.opcode) else {
            return self.fail(format!("`{}` is not modeled", instruction.opcode));
        };
        self.origin.opcode = opcode;
        self.guard = (0, false);
        if let Some((name, negated)) = instruction.guard {
            let slot = self.source(&Operand::Name(name, 0), File::Pred, false)?;
            self.guard = (slot, negated);
        }
        Ok(())
    }

    /// Emits a register-to-register form from its operands in order.
    pub fn emit_form(&mut self, form: &Form, operands: &[Operand<'a>], float: bool) -> Result<()> {
        let [d, sources @ ..] = operands else { return self.fail("operands are missing") };
        if sources.len() != form.src.len() {
            return self.fail(format!(
                "expected {} operands, found {}",
                form.src.len() + 1,
                operands.len()
            ));
        }
        let mut slots = Slots { d: 0, s: [0; 4] };
        for (slot, (operand, &file)) in slots.s.iter_mut().zip(sources.iter().zip(form.src)) {
            *slot = self.source(operand, file, float)?;
        }
        slots.d = self.destination(d, form.dst)?;
        self.emit(Op::Alu(form.run, slots));
        Ok(())
    }
}

fn special(name: &str) -> Option<Special> {
    let axis = || match name.rsplit_once('.')?.1 {
        "x" => Some(0),
        "y" => Some(1),
        "z" => Some(2),
        _ => None,
    };
    Some(match name.split('.').next()? {
        "%tid" => Special::Thread(axis()?),
        "%ntid" => Special::BlockSize(axis()?),
        "%ctaid" => Special::Block(axis()?),
        "%nctaid" => Special::GridSize(axis()?),
        "%laneid" => Special::Lane,
        "%warpid" => Special::Warp,
        "%nwarpid" => Special::Warps,
        "%lanemask_eq" => Special::LaneMask(MaskOf::Equal),
        "%lanemask_lt" => Special::LaneMask(MaskOf::Less),
        "%lanemask_le" => Special::LaneMask(MaskOf::LessEqual),
        "%lanemask_gt" => Special::LaneMask(MaskOf::Greater),
        "%lanemask_ge" => Special::LaneMask(MaskOf::GreaterEqual),
        "%dynamic_smem_size" => Special::DynamicShared,
        "%total_smem_size" => Special::TotalShared,
        "%smid" => Special::Zero,
        "%nsmid" => Special::One,
        _ => return None,
    })
}

pub(crate) const UNUSED: [u32; 4] = [NONE; 4];
