package dev.lobit.core.template

/** Writes what statements say. */
internal class Renderer(private val work: Work) {
    val evaluator = Evaluator(work)
    private var out = StringBuilder()
    private var calls = 0

    /** How a block was left. */
    private enum class End { REACHED, BREAK, CONTINUE }

    fun render(statements: List<Statement>, scope: Scope): String = captured { run(statements, scope) }

    /** The text that [write] writes. */
    private fun captured(write: () -> Unit): String {
        val outer = out
        out = StringBuilder()
        try {
            write()
            return out.toString()
        } finally {
            out = outer
        }
    }

    private fun run(statements: List<Statement>, scope: Scope): End {
        for (statement in statements) {
            work.step()
            val end = run(statement, scope)
            if (end != End.REACHED) return end
        }
        return End.REACHED
    }

    private fun run(statement: Statement, scope: Scope): End {
        when (statement) {
            is Text -> write(statement.text)
            is Print -> write(at(statement.line) { work.printed(evaluator.value(statement.value, scope)) })
            is If -> return at(statement.line) { branch(statement, scope) }
            is For -> at(statement.line) { loop(statement, scope) }
            is Assign -> at(statement.line) { assign(statement.target, evaluator.value(statement.value, scope), scope) }
            is AssignBlock -> assign(statement.target, filtered(statement.filter, statement.body, scope), scope)
            is FilterBlock -> write(work.printed(filtered(statement.filter, statement.body, scope)))
            is With -> return with(statement, scope)
            is DefineMacro -> scope.set(statement.name, Callable(statement.name) { call(statement, it, scope) })
            is Leave -> return if (statement.continues) End.CONTINUE else End.BREAK
        }
        return End.REACHED
    }

    private fun <T> at(line: Int, act: () -> T): T {
        evaluator.line = line
        return act()
    }

    private fun write(text: String) {
        work.text(text.length.toLong())
        if (out.length + text.length > Work.LARGEST_TEXT) broken("more than ${Work.LARGEST_TEXT} characters are written")
        out.append(text)
    }

    private fun branch(statement: If, scope: Scope): End {
        val case = statement.cases.find { (test, _) -> test == null || truth(evaluator.value(test, scope)) }
        return if (case == null) End.REACHED else run(case.second, scope)
    }

    private fun filtered(filter: Expression, body: List<Statement>, scope: Scope): Any? {
        val text = captured { run(body, Scope(scope)) }
        evaluator.captured = text
        return evaluator.value(filter, scope)
    }

    private fun with(statement: With, scope: Scope): End {
        val inner = Scope(scope)
        val values = statement.values.map { evaluator.value(it, scope) }
        statement.targets.forEachIndexed { i, target -> assign(target, values[i], inner) }
        return run(statement.body, inner)
    }

    private fun loop(statement: For, scope: Scope) {
        val value = evaluator.value(statement.items, scope)
        val items = if (value is Loop) unknown("a loop over the variable loop") else work.iterated(value)
        val tested = statement.test?.let { test -> passing(statement, test, items, scope) }
        val loop = Loop(work, tested ?: items, if (tested == null) work.sized(value)?.size?.toLong() else null)
        if (!repeat(statement, loop, scope)) run(statement.otherwise, Scope(scope))
    }

    private fun passing(statement: For, test: Expression, items: Iterator<Any?>, scope: Scope): Iterator<Any?> =
        items.asSequence().filter { item ->
            val inner = Scope(scope)
            assign(statement.target, item, inner)
            truth(evaluator.value(test, inner))
        }.iterator()

    /** Runs the body for each item; returns whether its end was reached at all, since otherwise `else` follows. */
    private fun repeat(statement: For, loop: Loop, scope: Scope): Boolean {
        var reached = false
        while (true) {
            val item = loop.next()
            if (item === ABSENT) return reached
            work.step()
            val inner = Scope(scope)
            inner.set("loop", loop)
            assign(statement.target, item, inner)
            when (run(statement.body, inner)) {
                End.BREAK -> return reached
                End.CONTINUE -> continue
                End.REACHED -> reached = true
            }
        }
    }

    private fun assign(target: Target, value: Any?, scope: Scope) {
        when (target) {
            is NameTarget -> scope.set(target.name, value)
            is FieldTarget -> {
                val namespace = scope.get(target.name) as? Namespace ?: broken("${target.name} is no namespace")
                if (target.field.startsWith("_")) broken("a namespace cannot hold ${target.field}")
                namespace.values[target.field] = value
            }
            is TupleTarget -> {
                val items = work.listed(value)
                if (items.size != target.targets.size) broken("${items.size} values are for ${target.targets.size} names")
                target.targets.forEachIndexed { i, part -> assign(part, items[i], scope) }
            }
        }
    }

    private fun call(macro: DefineMacro, given: Arguments, defined: Scope): String {
        if (++calls > DEEPEST) broken("macros call each other more than $DEEPEST levels deep")
        val values = given.bind("macro ${macro.name}", 0, *macro.parameters.map { it.first }.toTypedArray())
        val scope = Scope(defined)
        for ((i, parameter) in macro.parameters.withIndex()) {
            val (name, default) = parameter
            val value = when {
                values[i] !== ABSENT -> values[i]
                default != null -> evaluator.value(default, scope)
                else -> Undefined("the parameter $name")
            }
            scope.set(name, value)
        }
        return captured { run(macro.body, scope) }.also { calls-- }
    }

    private companion object {
        const val DEEPEST = 100
    }
}
