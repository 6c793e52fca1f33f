package dev.lobit.core.template

/** Statements of a template, by Jinja's grammar. */
internal class Parser(tokens: List<Token>) : ExpressionParser(tokens) {
    private var loops = 0

    fun template(): List<Statement> = statements(emptyList()).first

    /** Statements up to one of the given tags, whose name is returned too; that tag is read as far as its name. */
    private fun statements(ends: List<String>): Pair<List<Statement>, String> = deeper {
        val found = ArrayList<Statement>()
        var end: String? = null
        while (end == null) {
            val token = next()
            when (token.kind) {
                Kind.DATA -> found += Text(token.value as String)
                Kind.PRINT_BEGIN -> {
                    found += Print(token.line, tuple())
                    if (next().kind != Kind.PRINT_END) unexpected(previous)
                }
                Kind.BLOCK_BEGIN -> {
                    val name = next()
                    if (name.kind != Kind.NAME) unexpected(name)
                    if (name.value in ends) end = name.value as String else found += statement(name).also { blockEnd() }
                }
                else -> if (ends.isEmpty()) end = "" else brokenAt(token, "the template ends before ${ends.last()}")
            }
        }
        found to end
    }

    private fun blockEnd() {
        if (next().kind != Kind.BLOCK_END) unexpected(previous)
    }

    /** The statements between a tag whose end comes next and one of the given tags. */
    private fun body(vararg ends: String): Pair<List<Statement>, String> {
        skipOperator(":")
        blockEnd()
        return statements(ends.toList())
    }

    private fun statement(tag: Token): List<Statement> = when (tag.value) {
        "if" -> listOf(branches(tag))
        "for" -> listOf(loop(tag))
        "set" -> listOf(assignment(tag))
        "macro" -> listOf(macro(tag))
        "with" -> listOf(with(tag))
        "filter" -> filters(Captured, named = true).let { listOf(FilterBlock(tag.line, it, body("endfilter").first)) }
        "generation" -> body("endgeneration").first
        "break", "continue" -> if (loops > 0) listOf(Leave(tag.value == "continue")) else brokenAt(tag, "${tag.value} outside of a loop")
        else -> unknownAt(tag, "the tag ${tag.value}")
    }

    private fun branches(tag: Token): If {
        val cases = ArrayList<Pair<Expression?, List<Statement>>>()
        while (true) {
            val test = tuple(conditional = false)
            val (body, end) = body("elif", "else", "endif")
            cases += test to body
            if (end == "else") cases += null to body("endif").first
            if (end != "elif") return If(tag.line, cases)
        }
    }

    private fun loop(tag: Token): For {
        val target = target("in")
        expectName("in")
        val items = tuple(conditional = false, end = "recursive")
        val test = if (skipName("if")) expression() else null
        if (peek().isName("recursive")) unknownAt(peek(), "a recursive loop")
        loops++
        val (body, end) = body("endfor", "else")
        loops--
        return For(tag.line, target, items, test, body, if (end == "else") body("endfor").first else emptyList())
    }

    private fun assignment(tag: Token): Statement {
        val target = target(fields = true)
        if (skipOperator("=")) return Assign(tag.line, target, tuple())
        val filter = filters(Captured)
        return AssignBlock(tag.line, target, filter, body("endset").first)
    }

    private fun macro(tag: Token): DefineMacro {
        val name = name()
        val parameters = ArrayList<Pair<String, Expression?>>()
        expectOperator("(")
        while (!peek().isOperator(")")) {
            if (parameters.isNotEmpty()) expectOperator(",")
            val parameter = name()
            val value = if (skipOperator("=")) expression() else null
            if (value == null && parameters.any { it.second != null }) brokenAt(tag, "$parameter needs a default, as the one before it has")
            parameters += parameter to value
        }
        expectOperator(")")
        val outer = loops.also { loops = 0 }
        val body = body("endmacro").first
        loops = outer
        return DefineMacro(name, parameters, body)
    }

    private fun with(tag: Token): With {
        val targets = ArrayList<Target>()
        val values = ArrayList<Expression>()
        while (peek().kind != Kind.BLOCK_END) {
            if (targets.isNotEmpty()) expectOperator(",")
            targets += target()
            expectOperator("=")
            values += expression()
        }
        return With(tag.line, targets, values, body("endwith").first)
    }

    /** What is assigned to: a name, names with commas between them, or, where [fields] are allowed, a namespace's field. */
    private fun target(end: String = "", fields: Boolean = false): Target {
        val found = ArrayList<Target>()
        var tuple = false
        do {
            if (peek().isName(end) || tupleEnds()) break
            found += if (skipOperator("(")) target(fields = fields).also { expectOperator(")") } else nameTarget(fields)
            val more = skipOperator(",")
            tuple = tuple || more
        } while (more)
        return if (tuple) TupleTarget(found) else found.firstOrNull() ?: unexpected(peek())
    }

    private fun nameTarget(fields: Boolean): Target {
        val token = next()
        if (token.kind != Kind.NAME || token.value in CONSTANTS) brokenAt(token, "$token cannot be assigned to")
        val name = token.value as String
        return if (fields && skipOperator(".")) FieldTarget(name, name()) else NameTarget(checked(token, name))
    }
}
