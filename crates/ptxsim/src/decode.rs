//! The syntax tree to code: every name resolved, every constant in a register of its own.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use crate::catalogue;
use crate::cfg::{self, Flow};
use crate::convert::Scalar;
use crate::forms;
use crate::lanes::{File, Form, Slots};
use crate::op::{Address, Callee, Instr, NONE, Op, ParamSlot};
use crate::parse::{self, Ast, Location, Number, Operand, Result, Statement, Variable, error};

/// Limits of a card, which also bound what a text can make the simulator allocate.
const MAX_LOCAL: u64 = 512 << 10;
const MAX_VARIABLE: u64 = 1 << 32;
const MAX_PARAMS: u64 = 32764;
/// Bytes left free after each shared variable, so that running over its end is found.
const SHARED_GAP: u64 = 16;

/// What a constant register holds, once a block and a thread are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Source {
    Const(u64),
    Special(Special),
    /// A variable of the module, by index, and a constant.
    Variable(u32, i64),
    /// An offset in the frame's part of local memory.
    Local(i64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Special {
    Thread(u8),
    BlockSize(u8),
    Block(u8),
    GridSize(u8),
    Lane,
    Warp,
    Warps,
    LaneMask(MaskOf),
    DynamicShared,
    TotalShared,
    /// `%smid`, `%gridid` and the like: one multiprocessor, one grid.
    Zero,
    One,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum MaskOf {
    Equal,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
}

pub(crate) struct GlobalVariable {
    pub name: String,
    pub shared: bool,
    /// None for the dynamic part of shared memory.
    pub size: Option<u64>,
    pub align: u64,
    pub init: Vec<u8>,
}

/// A kernel parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Param {
    /// Name in the PTX.
    pub name: String,
    /// PTX type, `u64` say, or `b8` for a struct.
    pub ty: String,
    /// Bytes.
    pub size: usize,
    /// Alignment in bytes.
    pub align: usize,
    /// Offset in the parameter block.
    pub offset: usize,
}

/// Where an instruction came from.
#[derive(Clone, Copy)]
pub(crate) struct Origin {
    pub line: u32,
    pub opcode: u32,
    /// Index into `Code::locations`.
    pub location: u32,
}

pub(crate) struct Code {
    pub name: String,
    pub entry: bool,
    pub instrs: Vec<Instr>,
    pub origins: Vec<Origin>,
    /// Innermost place and the place it was inlined into.
    pub locations: Vec<(Location, Option<Location>)>,
    pub slots: [u32; 3],
    /// Registers that hold constants, by file and slot.
    pub constants: Vec<(File, u32, Source)>,
    pub params: Vec<Param>,
    pub formals: Vec<ParamSlot>,
    pub results: Vec<ParamSlot>,
    /// Bytes of the parameter area: the kernel's block, or a frame's.
    pub param_bytes: u32,
    pub local_bytes: u32,
    pub required_block: Option<[u32; 3]>,
    pub max_block: Option<[u32; 3]>,
    /// Registers the text declares (the virtual ones of PTX).
    pub registers: u32,
    pub calls: Vec<u32>,
}

/// A kernel's static shared memory.
#[derive(Default)]
pub(crate) struct SharedLayout {
    /// Variable index, offset and size.
    pub variables: Vec<(u32, u64, u64)>,
    pub dynamic_at: u64,
    /// What a card would count: without the gaps.
    pub static_bytes: u64,
}

pub(crate) struct Decoded {
    pub functions: Vec<Code>,
    pub variables: Vec<GlobalVariable>,
    pub files: HashMap<u32, String>,
    pub opcodes: Vec<String>,
    pub target: String,
}

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
    let signatures: Vec<_> = defined.clone().map(signature).collect::<Result<_>>()?;
    let functions = defined
        .zip(&signatures)
        .map(|(f, signature)| function(f, signature, &signatures, &mut module))
        .collect::<Result<_>>()?;
    let mut opcodes: Vec<_> = module.opcodes.into_iter().collect();
    opcodes.sort_by_key(|&(_, index)| index);
    let Ast { files, target, .. } = ast;
    Ok(Decoded {
        functions,
        variables: module.variables,
        files: files.into_iter().map(|(number, name)| (number, name.to_owned())).collect(),
        opcodes: opcodes.into_iter().map(|(name, _)| name.to_owned()).collect(),
        target: target.to_owned(),
    })
}

impl Decoded {
    /// Lays out the shared variables of an entry and of all it calls.
    pub fn shared_layout(&self, entry: usize) -> SharedLayout {
        let mut seen = vec![false; self.functions.len()];
        let mut used = vec![false; self.variables.len()];
        let mut stack = vec![entry];
        while let Some(function) = stack.pop() {
            if std::mem::replace(&mut seen[function], true) {
                continue;
            }
            let code = &self.functions[function];
            stack.extend(code.calls.iter().map(|&callee| callee as usize));
            for (_, _, source) in &code.constants {
                if let Source::Variable(index, _) = source {
                    used[*index as usize] |= self.variables[*index as usize].shared;
                }
            }
        }
        let mut layout = SharedLayout::default();
        let mut at = 0;
        let mut dynamic_align = 128;
        for (index, variable) in self.variables.iter().enumerate().filter(|&(i, _)| used[i]) {
            let Some(size) = variable.size else {
                dynamic_align = dynamic_align.max(variable.align);
                continue;
            };
            at = u64::next_multiple_of(at, variable.align);
            layout.variables.push((index as u32, at, size));
            at += size + SHARED_GAP;
            layout.static_bytes =
                layout.static_bytes.next_multiple_of(variable.align).saturating_add(size);
        }
        layout.dynamic_at = at.next_multiple_of(dynamic_align);
        layout
    }

    /// Whether an entry, or anything it calls, does atomics on memory that blocks share.
    pub fn has_global_atomics(&self, entry: usize) -> bool {
        let mut seen = vec![false; self.functions.len()];
        let mut stack = vec![entry];
        while let Some(function) = stack.pop() {
            if std::mem::replace(&mut seen[function], true) {
                continue;
            }
            let code = &self.functions[function];
            stack.extend(code.calls.iter().map(|&callee| callee as usize));
            let global = |instr: &Instr| matches!(&instr.op, Op::Atomic(atomic) if atomic.space != crate::op::Space::Shared);
            if code.instrs.iter().any(global) {
                return true;
            }
        }
        false
    }
}

#[derive(Default)]
struct ModuleScope<'a> {
    variables: Vec<GlobalVariable>,
    names: HashMap<&'a str, u32>,
    functions: HashMap<&'a str, u32>,
    opcodes: HashMap<&'a str, u32>,
}

fn scalar(variable: &Variable) -> Result<Scalar> {
    Scalar::of(variable.ty).map_or_else(
        || {
            error(
                variable.line,
                format!("type `.{}` of `{}` is not modelled", variable.ty, variable.name),
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
            format!("`{}` is larger than the {limit} bytes a card allows there", variable.name),
        ),
    }
}

impl<'a> ModuleScope<'a> {
    fn variable(&mut self, variable: &Variable<'a>) -> Result<u32> {
        let shared = variable.space == parse::Space::Shared;
        let limit = if shared { 1 << 20 } else { MAX_VARIABLE };
        let (size, align) = extent(variable, limit)?;
        if variable.external && !shared {
            return error(
                variable.line,
                format!(
                    "`{}` is defined in another module; linking is not modelled",
                    variable.name
                ),
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
        (Number::Int(value), File::R64 | File::R32) => value as u64,
        (Number::Int(value), File::Pred) => u64::from(value != 0),
        (Number::F32(bits), File::R64) if float => f64::from(f32::from_bits(bits)).to_bits(),
        (Number::F32(bits), _) => bits.into(),
        (Number::F64(bits), File::R64) => bits,
        (Number::F64(bits), _) => u64::from((f64::from_bits(bits) as f32).to_bits()),
    }
}

/// Where a function's parameters lie.
struct Signature {
    params: Vec<Param>,
    formals: Vec<ParamSlot>,
    results: Vec<ParamSlot>,
    bytes: u32,
}

fn signature(function: &parse::Function) -> Result<Signature> {
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
            return error(variable.line, "more parameters than a card allows");
        }
        Ok(slot)
    };
    let formals = function.params.iter().map(&mut place).collect::<Result<_>>()?;
    let results = function.returns.iter().map(&mut place).collect::<Result<_>>()?;
    // Words, since frames keep parameters as lanes of words.
    Ok(Signature { params, formals, results, bytes: at.next_multiple_of(8) as u32 })
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
    /// Prefix, file and count of `%r<91>`.
    ranges: Vec<(&'a str, File, u64)>,
    targets: HashMap<&'a str, Vec<&'a str>>,
}

/// Decodes one function; `forms` calls back for operands.
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

fn function<'a>(
    function: &parse::Function<'a>,
    signature: &Signature,
    signatures: &[Signature],
    module: &mut ModuleScope<'a>,
) -> Result<Code> {
    let mut decoder = Decoder {
        module,
        signatures,
        entry: function.entry,
        scopes: vec![Scope::default()],
        opened: 0,
        labels: HashMap::new(),
        constants: HashMap::new(),
        slots: [2, 0, 0],
        own_param_bytes: signature.bytes,
        param_bytes: signature.bytes,
        local_bytes: 0,
        registers: 0,
        branches: Vec::new(),
        instrs: Vec::new(),
        origins: Vec::new(),
        calls: Vec::new(),
        guard: (0, false),
        origin: Origin { line: function.line, opcode: 0, location: 0 },
    };
    let placed = function.params.iter().zip(&signature.formals);
    for (variable, slot) in placed.chain(function.returns.iter().zip(&signature.results)) {
        decoder.scopes[0].symbols.insert(variable.name, Symbol::Param(*slot));
    }
    let mut locations = Locations::default();
    let body = function.body.as_deref().unwrap_or_default();
    decoder.collect_branch_targets(body);
    for statement in body {
        match statement {
            Statement::Open => {
                decoder.opened += 1;
                let number = decoder.opened;
                decoder.scopes.push(Scope { number, ..Scope::default() });
            }
            Statement::Close => {
                decoder.scopes.pop();
            }
            Statement::Label(name, line) => {
                let scope = decoder.scopes.last().map_or(0, |scope| scope.number);
                let at = decoder.instrs.len() as u32;
                if decoder.labels.insert((scope, name), at).is_some() {
                    return error(*line, format!("label `{name}` is defined twice"));
                }
            }
            Statement::Variable(variable) => decoder.variable(variable)?,
            Statement::Loc { at, inlined_at } => {
                decoder.origin.location = locations.enter(*at, *inlined_at);
            }
            Statement::BranchTargets(_) => {}
            Statement::Instruction(instruction) => decoder.instruction(instruction)?,
        }
    }
    // Running off the end is a return.
    decoder.guard = (0, false);
    decoder.emit(Op::Return);
    decoder.resolve_branches()?;
    let registers = decoder.registers.min(u64::from(u32::MAX)) as u32;
    Ok(Code {
        name: function.name.to_owned(),
        entry: function.entry,
        instrs: decoder.instrs,
        origins: decoder.origins,
        locations: locations.list,
        slots: decoder.slots,
        constants: decoder
            .constants
            .into_iter()
            .map(|((file, source), slot)| (file, slot, source))
            .collect(),
        params: if function.entry { signature.params.clone() } else { Vec::new() },
        formals: signature.formals.clone(),
        results: signature.results.clone(),
        param_bytes: decoder.param_bytes,
        local_bytes: decoder.local_bytes as u32,
        required_block: function.required_block,
        max_block: function.max_block,
        registers,
        calls: decoder.calls,
    })
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

impl<'a> Decoder<'a, '_> {
    /// `brx.idx` may come before the table it names.
    fn collect_branch_targets(&mut self, body: &[Statement<'a>]) {
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

    fn variable(&mut self, variable: &Variable<'a>) -> Result<()> {
        let symbol = match variable.space {
            parse::Space::Reg => {
                let file = match variable.ty {
                    "pred" => File::Pred,
                    _ => scalar(variable)?.file(),
                };
                self.registers = self.registers.saturating_add(variable.range.unwrap_or(1));
                if let Some(count) = variable.range {
                    let scope = self.scopes.last_mut().expect("a body has a scope");
                    scope.ranges.push((variable.name, file, count));
                    return Ok(());
                }
                Symbol::Register(file, self.slot(file))
            }
            parse::Space::Local => {
                let (size, align) = extent(variable, MAX_LOCAL)?;
                let at = self.local_bytes.next_multiple_of(align.max(4));
                self.local_bytes = at + size.next_multiple_of(4);
                if self.local_bytes > MAX_LOCAL {
                    return error(variable.line, "more local memory than a card allows");
                }
                Symbol::Local(at as i64)
            }
            parse::Space::Param => {
                let (size, align) = extent(variable, MAX_PARAMS)?;
                let offset = u64::from(self.param_bytes).next_multiple_of(align.max(8));
                let end = (offset + size).next_multiple_of(8);
                if end > 1 << 20 {
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
            let digits = name.trim_start_matches(|c: char| !c.is_ascii_digit()).len();
            // A range's prefix may itself hold digits, so every split is tried.
            for split in name.len() - digits..name.len() {
                let (prefix, number) = name.split_at(split);
                let (Ok(number), false) =
                    (number.parse::<u64>(), number.len() > 1 && number.starts_with('0'))
                else {
                    continue;
                };
                let range = self.scopes[at].ranges.iter().rev().find(|range| range.0 == prefix);
                if let Some(&(_, file, count)) = range
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
            return self.fail("calls through a register are not modelled");
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
    pub fn emit_branch(&mut self, op: Op, labels: Vec<&'a str>) {
        let scopes = self.scopes.iter().map(|scope| scope.number).collect();
        self.branches.push((self.instrs.len(), scopes, labels));
        self.emit(op);
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

    fn instruction(&mut self, instruction: &parse::Instruction<'a>) -> Result<()> {
        self.origin.line = instruction.line;
        let known = self.module.opcodes.len() as u32;
        self.origin.opcode = match self.module.opcodes.entry(instruction.opcode) {
            Entry::Occupied(entry) => *entry.get(),
            Entry::Vacant(entry) => {
                if !catalogue::forms().contains(&catalogue::form_of(instruction.opcode)) {
                    return self.fail(format!("`{}` is not modelled", instruction.opcode));
                }
                *entry.insert(known)
            }
        };
        self.guard = (0, false);
        if let Some((name, negated)) = instruction.guard {
            let slot = self.source(&Operand::Name(name, 0), File::Pred, false)?;
            self.guard = (slot, negated);
        }
        let mut parts = instruction.opcode.split('.');
        let name = parts.next().unwrap_or_default();
        let mods: Vec<&str> = parts.collect();
        forms::decode(self, name, &mods, &instruction.operands)
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
