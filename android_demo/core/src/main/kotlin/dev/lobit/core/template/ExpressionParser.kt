package dev.lobit.core.template

/** Expressions of a template, by Jinja's grammar. */
internal open class ExpressionParser(private val tokens: List<Token>) {
    private var at = 0
    private var depth = 0

    protected val previous: Token get() = tokens[at - 1]

    protected fun peek(ahead: Int = 0): Token = tokens[minOf(at + ahead, tokens.size - 1)]

    protected fun next(): Token = peek().also { if (at < tokens.size) at++ }

    protected fun brokenAt(token: Token, what: String): Nothing = broken("line ${token.line}: $what")

    protected fun unexpected(token: Token): Nothing = brokenAt(token, "$token is not expected")

    protected fun unknownAt(token: Token, what: String): Nothing = unknown("$what in line ${token.line}")

    protected fun skipName(name: String): Boolean = peek().isName(name).also { if (it) at++ }

    protected fun skipOperator(text: String): Boolean = peek().isOperator(text).also { if (it) at++ }

    protected fun expectName(name: String) {
        if (!skipName(name)) unexpected(peek())
    }

    protected fun expectOperator(text: String) {
        if (!skipOperator(text)) unexpected(peek())
    }

    protected fun name(): String = next().let { if (it.kind == Kind.NAME) it.value as String else unexpected(it) }

    /** Refuses names that Jinja gives a meaning which is not known here. */
    protected fun checked(token: Token, name: String): String = if (name in UNKNOWN_NAMES) unknownAt(token, "the name $name") else name

    protected inline fun <T> deeper(read: () -> T): T {
        enter()
        return read().also { leave() }
    }

    protected fun enter() {
        if (++depth > DEEPEST) brokenAt(peek(), "more than $DEEPEST levels in each other")
    }

    protected fun leave() {
        depth--
    }

    protected fun tupleEnds() = peek().kind in ENDS || peek().isOperator(")")

    /** An expression, or several with commas between them, which are a tuple. */
    protected fun tuple(conditional: Boolean = true, end: String = "", empty: Boolean = false): Expression {
        val found = ArrayList<Expression>()
        var tuple = false
        do {
            if (tupleEnds() || peek().isName(end)) break
            found += expression(conditional)
            val more = skipOperator(",")
            tuple = tuple || more
        } while (more)
        if (!tuple && found.isEmpty() && !empty) unexpected(peek())
        return if (tuple || found.isEmpty()) Items(found, tuple = true) else found[0]
    }

    protected fun expression(conditional: Boolean = true): Expression = deeper {
        var found = either()
        while (conditional && skipName("if")) {
            val test = either()
            found = Conditional(test, found, if (skipName("else")) expression() else null)
        }
        found
    }

    private fun either(): Expression {
        var left = both()
        while (skipName("or")) left = Either(left, both())
        return left
    }

    private fun both(): Expression {
        var left = not()
        while (skipName("and")) left = Both(left, not())
        return left
    }

    private fun not(): Expression = if (skipName("not")) deeper { Not(not()) } else comparison()

    private fun comparison(): Expression {
        val first = sum()
        val rest = ArrayList<Pair<String, Expression>>()
        while (true) {
            val operator = when {
                peek().kind == Kind.OPERATOR && peek().value in COMPARISONS -> next().value as String
                skipName("in") -> "in"
                peek().isName("not") && peek(1).isName("in") -> "not in".also { repeat(2) { next() } }
                else -> return if (rest.isEmpty()) first else Comparison(first, rest)
            }
            rest += operator to sum()
        }
    }

    private fun sum(): Expression = chain(listOf("+", "-")) { concatenation() }

    private fun concatenation(): Expression {
        val parts = arrayListOf(product())
        while (skipOperator("~")) parts += product()
        return if (parts.size == 1) parts[0] else Concatenation(parts)
    }

    private fun product(): Expression = chain(listOf("*", "/", "//", "%")) { chain(listOf("**")) { unary() } }

    private fun chain(operators: List<String>, part: () -> Expression): Expression {
        var left = part()
        while (peek().kind == Kind.OPERATOR && peek().value in operators) left = Binary(next().value as String, left, part())
        return left
    }

    private fun unary(filtered: Boolean = true): Expression = deeper {
        val negative = peek().isOperator("-")
        val plain = if (skipOperator("-") || skipOperator("+")) Sign(unary(filtered = false), negative) else primary()
        val whole = postfix(plain)
        if (filtered) filtersAndTests(whole) else whole
    }

    private fun primary(): Expression {
        val token = next()
        return when {
            token.kind == Kind.NAME && token.value in CONSTANTS -> Constant(CONSTANTS[token.value])
            token.kind == Kind.NAME -> Name(checked(token, token.value as String))
            token.kind == Kind.STRING -> {
                val text = StringBuilder(token.value as String)
                while (peek().kind == Kind.STRING) text.append(next().value)
                Constant(text.toString())
            }
            token.kind == Kind.NUMBER -> Constant(token.value)
            token.isOperator("(") -> tuple(empty = true).also { expectOperator(")") }
            token.isOperator("[") -> Items(listed("]") { expression() }, tuple = false)
            token.isOperator("{") -> Dictionary(listed("}") { expression().also { expectOperator(":") } to expression() })
            else -> unexpected(token)
        }
    }

    /** Entries with commas between them up to [end], which may follow a comma. */
    private fun <T> listed(end: String, entry: () -> T): List<T> {
        val found = ArrayList<T>()
        while (!skipOperator(end)) {
            if (found.isNotEmpty()) expectOperator(",")
            if (skipOperator(end)) break
            found += entry()
        }
        return found
    }

    private fun postfix(of: Expression): Expression {
        var found = of
        while (true) {
            val token = peek()
            found = when {
                skipOperator(".") -> next().let { key ->
                    when (key.kind) {
                        Kind.NAME -> Attribute(token.line, found, key.value as String)
                        Kind.NUMBER -> Item(token.line, found, Constant(key.value))
                        else -> unexpected(key)
                    }
                }
                skipOperator("[") -> subscript(token, found)
                peek().isOperator("(") -> Call(token.line, found, given())
                else -> return found
            }
        }
    }

    private fun subscript(token: Token, of: Expression): Expression {
        val parts = arrayOfNulls<Expression>(3)
        var colons = 0
        while (!skipOperator("]")) {
            if (peek().isOperator(",")) unknownAt(token, "an index of several parts")
            if (skipOperator(":")) {
                if (++colons > 2) unexpected(previous)
            } else {
                if (parts[colons] != null) unexpected(peek())
                parts[colons] = expression()
            }
        }
        if (colons == 0) return Item(token.line, of, parts[0] ?: unexpected(previous))
        return Slice(token.line, of, parts[0], parts[1], parts[2])
    }

    /** Arguments in parentheses. */
    private fun given(): Given {
        val positional = ArrayList<Expression>()
        val named = ArrayList<Pair<String, Expression>>()
        val begin = peek()
        expectOperator("(")
        listed(")") {
            val token = peek()
            when {
                token.isOperator("*") || token.isOperator("**") -> unknownAt(token, "arguments with ${token.value} before them")
                token.kind == Kind.NAME && peek(1).isOperator("=") -> {
                    if (named.any { it.first == token.value }) brokenAt(token, "the argument ${token.value} is given twice")
                    repeat(2) { next() }
                    named += token.value as String to expression()
                }
                else -> {
                    if (named.isNotEmpty()) brokenAt(begin, "an argument without a name after one with a name")
                    positional += expression()
                }
            }
        }
        return Given(positional, named)
    }

    private fun filtersAndTests(of: Expression): Expression {
        var found = of
        while (true) {
            found = when {
                peek().isOperator("|") -> filters(found)
                peek().isName("is") -> test(found)
                peek().isOperator("(") -> Call(peek().line, found, given())
                else -> return found
            }
        }
    }

    /** Filters after [of]; where [named], the first has no bar before it. */
    protected fun filters(of: Expression, named: Boolean = false): Expression {
        var found = of
        var first = named
        while (first || skipOperator("|")) {
            first = false
            val line = peek().line
            found = Filter(line, found, dotted(), if (peek().isOperator("(")) given() else Given(emptyList(), emptyList()))
        }
        return found
    }

    private fun dotted(): String {
        val name = StringBuilder(name())
        while (skipOperator(".")) name.append('.').append(name())
        return name.toString()
    }

    private fun test(of: Expression): Expression {
        val line = next().line
        val negated = skipName("not")
        val name = dotted()
        val token = peek()
        val begins = token.kind in setOf(Kind.NAME, Kind.STRING, Kind.NUMBER) || token.isOperator("[") || token.isOperator("{")
        val given = when {
            token.isOperator("(") -> given()
            begins && !(token.kind == Kind.NAME && token.value in setOf("else", "or", "and")) -> {
                if (token.isName("is")) brokenAt(token, "tests cannot be chained with is")
                Given(listOf(postfix(primary())), emptyList())
            }
            else -> Given(emptyList(), emptyList())
        }
        return Test(line, of, name, given).let { if (negated) Not(it) else it }
    }

    protected companion object {
        const val DEEPEST = 100
        val ENDS = setOf(Kind.PRINT_END, Kind.BLOCK_END)
        val COMPARISONS = setOf("==", "!=", "<", "<=", ">", ">=")
        val CONSTANTS = mapOf("true" to true, "True" to true, "false" to false, "False" to false, "none" to null, "None" to null)
        val UNKNOWN_NAMES = setOf("lipsum", "cycler", "joiner", "self", "caller", "varargs", "kwargs")
    }
}
