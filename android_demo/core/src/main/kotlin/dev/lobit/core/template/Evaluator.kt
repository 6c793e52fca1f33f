package dev.lobit.core.template

/** Variables of a block; those that it does not have are the outer block's. */
internal class Scope(private val outer: Scope?, private val values: MutableMap<String, Any?> = HashMap()) {
    fun get(name: String): Any? = when {
        values.containsKey(name) -> values[name]
        outer != null -> outer.get(name)
        else -> Undefined("the variable $name")
    }

    fun set(name: String, value: Any?) {
        values[name] = value
    }
}

/** Values of expressions. */
internal class Evaluator(private val work: Work) {
    private val access = Access(work, Methods(work))
    private val tests = Tests(work)
    private val filters = Filters(work, access, tests)

    /** The line of the template that was evaluated last. */
    var line = 1

    /** The text of the block that a filter is applied to. */
    var captured = ""

    fun value(of: Expression, scope: Scope): Any? {
        work.step()
        return when (of) {
            is Constant -> of.value
            is Captured -> captured
            is Name -> scope.get(of.name)
            is Items -> of.items.map { value(it, scope) }.let { if (of.tuple) TupleValue(it) else it }
            is Dictionary -> of.pairs.associate { (key, item) -> key(value(key, scope)) to value(item, scope) }
            is Attribute -> access.attribute(value(of.of, scope).also { line = of.line }, of.name)
            is Item -> access.item(value(of.of, scope), value(of.key, scope).also { line = of.line })
            is Slice -> sliced(of, scope)
            is Call -> called(of, scope)
            is Filter -> value(of.of, scope).let { filters.apply(of.name, it, arguments(of.given, scope).also { line = of.line }) }
            is Test -> value(of.of, scope).let { tests.holds(of.name, it, arguments(of.given, scope).also { line = of.line }) }
            is Not -> !truth(value(of.of, scope))
            is Both -> value(of.left, scope).let { if (truth(it)) value(of.right, scope) else it }
            is Either -> value(of.left, scope).let { if (truth(it)) it else value(of.right, scope) }
            is Sign -> signed(value(of.of, scope), of.negative)
            is Binary -> work.binary(of.operator, value(of.left, scope), value(of.right, scope))
            is Concatenation -> work.join(of.parts.map { work.printed(value(it, scope)) }, "")
            is Comparison -> chain(of, scope)
            is Conditional -> when {
                truth(value(of.test, scope)) -> value(of.then, scope)
                of.otherwise != null -> value(of.otherwise, scope)
                else -> Undefined("a condition without else")
            }
        }
    }

    private fun sliced(of: Slice, scope: Scope): Any? {
        val whole = value(of.of, scope)
        val bounds = listOf(of.start, of.stop, of.step).map { bound -> bound?.let { value(it, scope) } }
        line = of.line
        return access.slice(whole, bounds[0], bounds[1], bounds[2])
    }

    private fun called(of: Call, scope: Scope): Any? {
        val callee = value(of.callee, scope)
        val given = arguments(of.given, scope)
        line = of.line
        return (callee as? Callable ?: broken("${typeOf(callee)} cannot be called")).call(given)
    }

    private fun arguments(given: Given, scope: Scope) =
        Arguments(given.positional.map { value(it, scope) }, given.named.associate { (name, argument) -> name to value(argument, scope) })

    private fun signed(value: Any?, negative: Boolean): Number = when (val number = number(value)) {
        is Long -> if (negative) Math.negateExact(number) else number
        is Double -> if (negative) -number else number
        else -> broken("${typeOf(value)} has no sign")
    }

    private fun chain(of: Comparison, scope: Scope): Boolean {
        var left = value(of.first, scope)
        for ((operator, expression) in of.rest) {
            val right = value(expression, scope)
            if (!work.compared(operator, left, right)) return false
            left = right
        }
        return true
    }
}
