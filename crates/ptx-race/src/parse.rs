//! PTX text to a syntax tree. Names stay slices of the text; nothing is resolved here.
//!
//! Sizes and counts are only numbers at this stage, so that a text asking for a billion registers
//! costs what its letters cost.

use std::fmt;

/// Why a text is not a PTX module this crate can run, and the line that says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseError {
    /// 1-based line of the PTX text.
    pub line: u32,
    /// What is wrong, as a sentence without a full stop.
    pub message: String,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PTX line {}: {}", self.line, self.message)
    }
}

impl std::error::Error for ParseError {}

pub(crate) type Result<T> = std::result::Result<T, ParseError>;

pub(crate) fn error<T>(line: u32, message: impl Into<String>) -> Result<T> {
    Err(ParseError { line, message: message.into() })
}

#[derive(Debug, Default)]
pub(crate) struct Ast<'a> {
    pub functions: Vec<Function<'a>>,
    pub variables: Vec<Variable<'a>>,
    pub files: Vec<(u32, &'a str)>,
    pub target: &'a str,
}

#[derive(Debug)]
pub(crate) struct Function<'a> {
    pub name: &'a str,
    pub line: u32,
    pub entry: bool,
    pub returns: Vec<Variable<'a>>,
    pub params: Vec<Variable<'a>>,
    /// Block size named by `.reqntid`, or its limit named by `.maxntid`.
    pub required_block: Option<[u32; 3]>,
    pub max_block: Option<[u32; 3]>,
    /// None for a declaration.
    pub body: Option<Vec<Statement<'a>>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StateSpace {
    Reg,
    Param,
    Local,
    Shared,
    Global,
    Const,
}

#[derive(Clone, Debug)]
pub(crate) struct Variable<'a> {
    pub name: &'a str,
    pub line: u32,
    pub space: StateSpace,
    pub ty: &'a str,
    pub align: Option<u64>,
    /// Elements in all, vectors and array dimensions multiplied; None for `name[]`.
    pub elements: Option<u64>,
    /// `%r<91>` declares a range of registers.
    pub range: Option<u64>,
    pub external: bool,
    pub init: Vec<Number>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Number {
    Int(i128),
    F32(u32),
    F64(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Location {
    pub file: u32,
    pub line: u32,
    pub column: u32,
}

#[derive(Debug)]
pub(crate) enum Statement<'a> {
    /// `{`, and its line.
    Open(u32),
    Close,
    Label(&'a str, u32),
    Variable(Variable<'a>),
    Loc {
        at: Location,
        inlined_at: Option<Location>,
    },
    BranchTargets(Vec<&'a str>),
    Instruction(Instruction<'a>),
}

#[derive(Debug)]
pub(crate) struct Instruction<'a> {
    pub line: u32,
    pub opcode: &'a str,
    pub guard: Option<(&'a str, bool)>,
    pub operands: Vec<Operand<'a>>,
}

#[derive(Clone, Debug)]
pub(crate) enum Operand<'a> {
    /// A register, label, variable or function, with a constant added.
    Name(&'a str, i64),
    Not(&'a str),
    Pair(&'a str, &'a str),
    Number(Number),
    Address(&'a str, i64),
    AbsoluteAddress(i64),
    Vector(Vec<Operand<'a>>),
    /// The parenthesized lists of a call.
    List(Vec<Operand<'a>>),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Token<'a> {
    Word(&'a str),
    Number(Number),
    Text(&'a str),
    Punct(u8),
    End,
}

impl fmt::Display for Token<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Token::Word(word) => write!(f, "`{word}`"),
            Token::Number(Number::Int(value)) => write!(f, "`{value}`"),
            Token::Number(_) => write!(f, "a floating-point literal"),
            Token::Text(text) => write!(f, "\"{text}\""),
            Token::Punct(byte) => write!(f, "`{}`", char::from(*byte).escape_default()),
            Token::End => write!(f, "the end of the text"),
        }
    }
}

struct Lexer<'a> {
    text: &'a str,
    at: usize,
    line: u32,
}

impl<'a> Lexer<'a> {
    fn byte(&self, ahead: usize) -> u8 {
        self.text.as_bytes().get(self.at + ahead).copied().unwrap_or(0)
    }

    fn skip_blank(&mut self) -> Result<()> {
        loop {
            match (self.byte(0), self.byte(1)) {
                (b'\n', _) => {
                    self.line += 1;
                    self.at += 1;
                }
                (b' ' | b'\t' | b'\r', _) => self.at += 1,
                (b'/', b'/') => {
                    while self.at < self.text.len() && self.byte(0) != b'\n' {
                        self.at += 1;
                    }
                }
                (b'/', b'*') => {
                    let Some(end) = self.text[self.at + 2..].find("*/") else {
                        return error(self.line, "this comment is never closed");
                    };
                    let comment = &self.text[self.at..self.at + 2 + end];
                    self.line += comment.bytes().filter(|&b| b == b'\n').count() as u32;
                    self.at += end + 4;
                }
                _ => return Ok(()),
            }
        }
    }

    /// The next token and the line it starts on.
    fn next(&mut self) -> Result<(Token<'a>, u32)> {
        self.skip_blank()?;
        let (start, line) = (self.at, self.line);
        if start >= self.text.len() {
            return Ok((Token::End, line));
        }
        let first = self.byte(0);
        let token = match first {
            b'0'..=b'9' => Token::Number(self.number()?),
            b'A'..=b'Z' | b'a'..=b'z' | b'_' | b'$' | b'%' | b'.' => {
                self.at += 1;
                loop {
                    match self.byte(0) {
                        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'_' | b'$' | b'.' => {
                            self.at += 1;
                        }
                        // `shared::cta`: a scope inside a modifier, not a label's colon.
                        b':' if self.byte(1) == b':' => self.at += 2,
                        _ => break,
                    }
                }
                Token::Word(&self.text[start..self.at])
            }
            b'"' => {
                let Some(length) = self.text[start + 1..].find('"') else {
                    return error(line, "this string is never closed");
                };
                let text = &self.text[start + 1..start + 1 + length];
                self.line += text.bytes().filter(|&b| b == b'\n').count() as u32;
                self.at += length + 2;
                Token::Text(text)
            }
            b'!'..=b'~' => {
                self.at += 1;
                Token::Punct(first)
            }
            _ => return error(line, "a character that PTX does not use"),
        };
        Ok((token, line))
    }

    fn digits(&mut self) -> &'a str {
        let start = self.at;
        while self.byte(0).is_ascii_alphanumeric() {
            self.at += 1;
        }
        &self.text[start..self.at]
    }

    fn number(&mut self) -> Result<Number> {
        let line = self.line;
        let start = self.at;
        let word = self.digits();
        let bad = || ParseError { line, message: format!("`{word}` is not a number") };
        let int = |digits: &str, radix| {
            let digits = digits.trim_end_matches('U');
            u64::from_str_radix(digits, radix).map(|v| Number::Int(v.into())).map_err(|_| bad())
        };
        let rest = word.get(2..).unwrap_or("");
        match word.as_bytes().get(1) {
            Some(b'f' | b'F') if word.starts_with('0') && rest.len() == 8 => {
                u32::from_str_radix(rest, 16).map(Number::F32).map_err(|_| bad())
            }
            Some(b'd' | b'D') if word.starts_with('0') && rest.len() == 16 => {
                u64::from_str_radix(rest, 16).map(Number::F64).map_err(|_| bad())
            }
            Some(b'x' | b'X') if word.starts_with('0') => int(rest, 16),
            Some(b'b' | b'B') if word.starts_with('0') => int(rest, 2),
            _ if self.byte(0) == b'.' && self.byte(1).is_ascii_digit() => {
                self.at += 1;
                self.digits();
                let text = &self.text[start..self.at];
                text.parse().map(|v: f64| Number::F64(v.to_bits())).map_err(|_| bad())
            }
            Some(b'0'..=b'7') if word.starts_with('0') => int(&word[1..], 8),
            _ => int(word, 10),
        }
    }
}

struct Parser<'a> {
    lexer: Lexer<'a>,
    token: Token<'a>,
    /// Line of `token`.
    line: u32,
}

/// Parses a whole module.
pub(crate) fn parse(text: &str) -> Result<Ast<'_>> {
    let lexer = Lexer { text, at: 0, line: 1 };
    let mut parser = Parser { lexer, token: Token::End, line: 1 };
    parser.advance()?;
    parser.module()
}

impl<'a> Parser<'a> {
    fn advance(&mut self) -> Result<()> {
        (self.token, self.line) = self.lexer.next()?;
        Ok(())
    }

    fn unexpected<T>(&self, wanted: &str) -> Result<T> {
        error(self.line, format!("expected {wanted}, found {}", self.token))
    }

    fn eat(&mut self, punct: u8) -> Result<bool> {
        let found = self.token == Token::Punct(punct);
        if found {
            self.advance()?;
        }
        Ok(found)
    }

    fn expect(&mut self, punct: u8) -> Result<()> {
        if self.eat(punct)? {
            return Ok(());
        }
        self.unexpected(&format!("`{}`", char::from(punct)))
    }

    fn word(&mut self) -> Result<&'a str> {
        let Token::Word(word) = self.token else { return self.unexpected("a name") };
        self.advance()?;
        Ok(word)
    }

    fn integer(&mut self) -> Result<i128> {
        let negative = self.eat(b'-')?;
        let Token::Number(Number::Int(value)) = self.token else {
            return self.unexpected("an integer");
        };
        self.advance()?;
        Ok(if negative { -value } else { value })
    }

    fn unsigned(&mut self) -> Result<u64> {
        let line = self.line;
        let value = self.integer()?;
        u64::try_from(value).or_else(|_| error(line, format!("{value} is out of range")))
    }

    fn index(&mut self) -> Result<u32> {
        let line = self.line;
        let value = self.integer()?;
        u32::try_from(value).or_else(|_| error(line, format!("{value} is out of range")))
    }

    fn text(&mut self) -> Result<&'a str> {
        let Token::Text(text) = self.token else { return self.unexpected("a string") };
        self.advance()?;
        Ok(text)
    }

    fn module(mut self) -> Result<Ast<'a>> {
        let mut ast = Ast::default();
        let mut external = false;
        loop {
            let line = self.line;
            match self.token {
                Token::End => return Ok(ast),
                Token::Word(".version") => {
                    self.advance()?;
                    self.advance()?;
                }
                Token::Word(".target") => {
                    self.advance()?;
                    ast.target = self.word()?;
                    while self.eat(b',')? {
                        self.word()?;
                    }
                }
                Token::Word(".address_size") => {
                    self.advance()?;
                    if self.integer()? != 64 {
                        return error(line, "only 64-bit addresses are modeled");
                    }
                }
                Token::Word(".extern") => {
                    external = true;
                    self.advance()?;
                    continue;
                }
                Token::Word(".entry" | ".func") => ast.functions.push(self.function()?),
                Token::Word(".global" | ".const" | ".shared") => {
                    self.variables(external, &mut ast.variables)?;
                }
                Token::Word(".file") => {
                    self.advance()?;
                    let number = self.index()?;
                    ast.files.push((number, self.text()?));
                    while self.eat(b',')? {
                        self.integer()?;
                    }
                }
                Token::Word(".section") => {
                    self.advance()?;
                    self.word()?;
                    self.skip_braces()?;
                }
                Token::Word(".pragma") => {
                    while !self.eat(b';')? {
                        self.skip_inside("a pragma")?;
                    }
                }
                Token::Word(".visible" | ".weak" | ".common") | Token::Punct(b';') => {
                    self.advance()?;
                }
                _ => return self.unexpected("a directive, function or variable"),
            }
            external = false;
        }
    }

    fn skip_inside(&mut self, what: &str) -> Result<()> {
        if self.token == Token::End {
            return error(self.line, format!("the text ends inside {what}"));
        }
        self.advance()
    }

    fn skip_braces(&mut self) -> Result<()> {
        self.expect(b'{')?;
        let mut depth = 1;
        while depth > 0 {
            match self.token {
                Token::Punct(b'{') => depth += 1,
                Token::Punct(b'}') => depth -= 1,
                _ => {}
            }
            self.skip_inside("a section")?;
        }
        Ok(())
    }

    fn function(&mut self) -> Result<Function<'a>> {
        let entry = self.word()? == ".entry";
        let mut returns = Vec::new();
        if self.token == Token::Punct(b'(') {
            returns = self.parameters()?;
        }
        let line = self.line;
        let name = self.word()?;
        let params = if self.token == Token::Punct(b'(') { self.parameters()? } else { Vec::new() };
        let mut function = Function {
            name,
            line,
            entry,
            returns,
            params,
            required_block: None,
            max_block: None,
            body: None,
        };
        loop {
            match self.token {
                Token::Punct(b';') => {
                    self.advance()?;
                    return Ok(function);
                }
                Token::Punct(b'{') => {
                    function.body = Some(self.body()?);
                    return Ok(function);
                }
                Token::Word(directive @ (".maxntid" | ".reqntid")) => {
                    self.advance()?;
                    let mut block = [self.index()?, 1, 1];
                    for size in &mut block[1..] {
                        if self.eat(b',')? {
                            *size = self.index()?;
                        }
                    }
                    if directive == ".reqntid" {
                        function.required_block = Some(block);
                    } else {
                        function.max_block = Some(block);
                    }
                }
                Token::Word(".minnctapersm" | ".maxnreg" | ".maxnctapersm") => {
                    self.advance()?;
                    self.integer()?;
                }
                Token::Word(".noreturn") => self.advance()?,
                Token::Word(".pragma") => {
                    while !self.eat(b';')? {
                        self.skip_inside("a pragma")?;
                    }
                }
                _ => return self.unexpected("a function body or `;`"),
            }
        }
    }

    fn parameters(&mut self) -> Result<Vec<Variable<'a>>> {
        self.expect(b'(')?;
        let mut list = Vec::new();
        if self.eat(b')')? {
            return Ok(list);
        }
        loop {
            let space = self.space()?;
            list.push(self.variable(space, false)?);
            if self.eat(b')')? {
                return Ok(list);
            }
            self.expect(b',')?;
        }
    }

    fn space(&mut self) -> Result<StateSpace> {
        let line = self.line;
        Ok(match self.word()? {
            ".reg" => StateSpace::Reg,
            ".param" => StateSpace::Param,
            ".local" => StateSpace::Local,
            ".shared" => StateSpace::Shared,
            ".global" => StateSpace::Global,
            ".const" => StateSpace::Const,
            other => return error(line, format!("expected a state space, found `{other}`")),
        })
    }

    fn variables(&mut self, external: bool, into: &mut Vec<Variable<'a>>) -> Result<()> {
        let space = self.space()?;
        let mut variable = self.variable(space, external)?;
        loop {
            let next = Variable { elements: Some(1), range: None, ..variable.clone() };
            into.push(variable);
            if !self.eat(b',')? {
                return self.expect(b';');
            }
            variable = next;
            self.declarator(&mut variable)?;
        }
    }

    fn variable(&mut self, space: StateSpace, external: bool) -> Result<Variable<'a>> {
        let mut variable = Variable {
            name: "",
            line: self.line,
            space,
            ty: "",
            align: None,
            elements: Some(1),
            range: None,
            external,
            init: Vec::new(),
        };
        let mut vector = 1;
        loop {
            let line = self.line;
            match self.word()? {
                ".align" => variable.align = Some(self.unsigned()?),
                ".v2" => vector = 2,
                ".v4" => vector = 4,
                // A kernel parameter may say what its pointer points to.
                ".ptr" | ".global" | ".const" | ".shared" | ".local" => {}
                ".attribute" => {
                    while !self.eat(b')')? {
                        self.skip_inside("an attribute")?;
                    }
                }
                word if word.starts_with('.') => {
                    if !variable.ty.is_empty() {
                        return error(line, format!("unexpected `{word}` in a declaration"));
                    }
                    variable.ty = &word[1..];
                    // `.param .u64 .ptr .global .align 16 name`: qualifiers follow the type.
                    while matches!(self.token, Token::Word(w) if w.starts_with('.')) {
                        if self.word()? == ".align" {
                            variable.align = Some(self.unsigned()?);
                        }
                    }
                    break;
                }
                word => return error(line, format!("expected a type, found `{word}`")),
            }
        }
        variable.elements = Some(vector);
        self.declarator(&mut variable)?;
        Ok(variable)
    }

    /// The name, range, dimensions and initial values of one variable.
    fn declarator(&mut self, variable: &mut Variable<'a>) -> Result<()> {
        variable.line = self.line;
        variable.name = self.word()?;
        if self.eat(b'<')? {
            variable.range = Some(self.unsigned()?);
            self.expect(b'>')?;
        }
        while self.eat(b'[')? {
            if self.eat(b']')? {
                variable.elements = None;
                continue;
            }
            let line = self.line;
            let size = self.unsigned()?;
            let product = variable.elements.map(|elements| elements.checked_mul(size));
            match product {
                Some(None) => return error(line, "this array's size overflows"),
                Some(product) => variable.elements = product,
                None => {}
            }
            self.expect(b']')?;
        }
        if self.eat(b'=')? {
            self.initial_values(&mut variable.init)?;
        }
        Ok(())
    }

    fn initial_values(&mut self, into: &mut Vec<Number>) -> Result<()> {
        // Braces only group: the values are taken in order.
        let mut depth = 0u32;
        loop {
            match self.token {
                Token::Punct(b'{') => {
                    depth += 1;
                    self.advance()?;
                }
                Token::Punct(b'}') if depth > 0 => {
                    depth -= 1;
                    self.advance()?;
                }
                Token::Punct(b',') if depth > 0 => self.advance()?,
                Token::Number(_) | Token::Punct(b'-') => into.push(self.number()?),
                Token::Word(name) => {
                    return error(
                        self.line,
                        format!("initial values that are addresses (`{name}`) are not modeled"),
                    );
                }
                _ => return self.unexpected("an initial value"),
            }
            if depth == 0 {
                return Ok(());
            }
        }
    }

    fn number(&mut self) -> Result<Number> {
        if self.token == Token::Punct(b'-') {
            self.advance()?;
            let Token::Number(number) = self.token else { return self.unexpected("a number") };
            self.advance()?;
            return Ok(match number {
                Number::Int(value) => Number::Int(-value),
                Number::F32(bits) => Number::F32(bits ^ 1 << 31),
                Number::F64(bits) => Number::F64(bits ^ 1 << 63),
            });
        }
        let Token::Number(number) = self.token else { return self.unexpected("a number") };
        self.advance()?;
        Ok(number)
    }

    fn body(&mut self) -> Result<Vec<Statement<'a>>> {
        self.expect(b'{')?;
        let mut body = Vec::new();
        let mut depth = 1;
        loop {
            let line = self.line;
            match self.token {
                Token::Punct(b'{') => {
                    depth += 1;
                    body.push(Statement::Open(line));
                    self.advance()?;
                }
                Token::Punct(b'}') => {
                    depth -= 1;
                    self.advance()?;
                    if depth == 0 {
                        return Ok(body);
                    }
                    body.push(Statement::Close);
                }
                Token::Punct(b';') => self.advance()?,
                Token::Punct(b'@') => {
                    self.advance()?;
                    let negated = self.eat(b'!')?;
                    let predicate = self.word()?;
                    let opcode = self.word()?;
                    body.push(self.instruction(line, opcode, Some((predicate, negated)))?);
                }
                Token::Word(word) if word.starts_with('.') => self.directive(word, &mut body)?,
                Token::Word(word) => {
                    self.advance()?;
                    if self.eat(b':')? {
                        body.push(Statement::Label(word, line));
                    } else {
                        body.push(self.instruction(line, word, None)?);
                    }
                }
                _ => return self.unexpected("an instruction"),
            }
        }
    }

    fn directive(&mut self, word: &'a str, body: &mut Vec<Statement<'a>>) -> Result<()> {
        let line = self.line;
        match word {
            ".reg" | ".local" | ".shared" | ".param" | ".global" | ".const" => {
                let mut list = Vec::new();
                self.variables(false, &mut list)?;
                body.extend(list.into_iter().map(Statement::Variable));
            }
            ".loc" => {
                self.advance()?;
                let at = self.location()?;
                let mut inlined_at = None;
                while self.eat(b',')? {
                    if self.word()? == "inlined_at" {
                        inlined_at = Some(self.location()?);
                        break;
                    }
                    // function_name LABEL [+ offset]
                    self.word()?;
                    if self.eat(b'+')? {
                        self.integer()?;
                    }
                }
                body.push(Statement::Loc { at, inlined_at });
            }
            ".pragma" => {
                while !self.eat(b';')? {
                    self.skip_inside("a pragma")?;
                }
            }
            ".branchtargets" => {
                self.advance()?;
                let mut targets = vec![self.word()?];
                while self.eat(b',')? {
                    targets.push(self.word()?);
                }
                self.expect(b';')?;
                body.push(Statement::BranchTargets(targets));
            }
            _ => return error(line, format!("unknown directive `{word}`")),
        }
        Ok(())
    }

    fn location(&mut self) -> Result<Location> {
        Ok(Location { file: self.index()?, line: self.index()?, column: self.index()? })
    }

    fn instruction(
        &mut self,
        line: u32,
        opcode: &'a str,
        guard: Option<(&'a str, bool)>,
    ) -> Result<Statement<'a>> {
        let mut operands = Vec::new();
        if !self.eat(b';')? {
            loop {
                operands.push(self.operand(0)?);
                if self.eat(b';')? {
                    break;
                }
                self.expect(b',')?;
            }
        }
        Ok(Statement::Instruction(Instruction { line, opcode, guard, operands }))
    }

    fn operand(&mut self, depth: u32) -> Result<Operand<'a>> {
        match self.token {
            Token::Punct(open @ (b'{' | b'(')) => {
                if depth > 1 {
                    return error(self.line, "operands are nested too deeply");
                }
                self.advance()?;
                let close = if open == b'{' { b'}' } else { b')' };
                let mut list = Vec::new();
                if !self.eat(close)? {
                    loop {
                        list.push(self.operand(depth + 1)?);
                        if self.eat(close)? {
                            break;
                        }
                        self.expect(b',')?;
                    }
                }
                Ok(if open == b'{' { Operand::Vector(list) } else { Operand::List(list) })
            }
            Token::Punct(b'[') => {
                self.advance()?;
                let address = if matches!(self.token, Token::Word(_)) {
                    let name = self.word()?;
                    Operand::Address(name, self.offset()?)
                } else {
                    Operand::AbsoluteAddress(self.small()?)
                };
                self.expect(b']')?;
                Ok(address)
            }
            Token::Punct(b'!') => {
                self.advance()?;
                Ok(Operand::Not(self.word()?))
            }
            Token::Word(_) => {
                let name = self.word()?;
                if self.eat(b'|')? {
                    return Ok(Operand::Pair(name, self.word()?));
                }
                Ok(Operand::Name(name, self.offset()?))
            }
            _ => Ok(Operand::Number(self.number()?)),
        }
    }

    /// The `+4`, `+-4` or `-4` that may follow a base.
    fn offset(&mut self) -> Result<i64> {
        if self.eat(b'+')? || self.token == Token::Punct(b'-') { self.small() } else { Ok(0) }
    }

    fn small(&mut self) -> Result<i64> {
        let line = self.line;
        let value = self.integer()?;
        // Hexadecimal offsets may be written as unsigned.
        i64::try_from(value)
            .or_else(|_| u64::try_from(value).map(|v| v as i64))
            .or_else(|_| error(line, format!("{value} is out of range")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_every_base() {
        for (text, wanted) in [
            ("42", Number::Int(42)),
            ("0x2AU", Number::Int(42)),
            ("052", Number::Int(42)),
            ("0b101010", Number::Int(42)),
            ("0f3F800000", Number::F32(0x3F80_0000)),
            ("0d3FF0000000000000", Number::F64(1f64.to_bits())),
            ("1.5", Number::F64(1.5f64.to_bits())),
        ] {
            let mut lexer = Lexer { text, at: 0, line: 1 };
            assert_eq!(lexer.next().unwrap().0, Token::Number(wanted), "{text}");
        }
    }

    #[test]
    fn errors_name_the_line() {
        for (text, line) in [
            (".version 9.0\n.nonsense", 2),
            (".entry k()\n{\n add.s32 %r1, %r2\n}", 4),
            (".global .b8 x[18446744073709551615][3];", 1),
            ("/* open", 1),
            (".entry k() {\n\n.loc 1 99999999999 3\n}", 3),
        ] {
            assert_eq!(parse(text).unwrap_err().line, line, "{text}");
        }
    }
}
