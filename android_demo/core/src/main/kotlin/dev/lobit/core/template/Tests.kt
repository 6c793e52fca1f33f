package dev.lobit.core.template

/** Jinja's tests, which stand after `is`. */
internal class Tests(private val work: Work) {
    fun holds(name: String, value: Any?, given: Arguments): Boolean {
        COMPARED[name]?.let { return work.compared(it, value, given.bind(name, 1, "other")[0]) }
        if (name == "divisibleby") return work.equal(remainder(value, given.bind(name, 1, "num")[0]), 0L)
        if (name == "sameas") return isSame(value, given.bind(name, 1, "other")[0])
        given.bind(name, 0)
        return when (name) {
            "defined" -> value !is Undefined
            "undefined" -> value is Undefined
            "none" -> value == null
            "boolean" -> value is Boolean
            "true" -> value == true
            "false" -> value == false
            "integer" -> value is Long
            "float" -> value is Double
            "number" -> number(value) != null
            "string" -> value is String || value is SafeText
            "mapping" -> value is Map<*, *>
            "sequence" -> value is Undefined || value is SafeText || (value !is View && value !is Loop && work.sized(value) != null)
            "iterable" -> value is Loop || value is SafeText || work.iterator(value) != null
            "callable" -> value is Callable || value is Undefined
            "odd" -> remainder(value, 2L) == 1L
            "even" -> remainder(value, 2L) == 0L
            "lower", "upper" -> isCased(work.printed(value), name == "upper")
            else -> unknown("the test $name")
        }
    }

    private fun remainder(value: Any?, by: Any?): Any? = work.binary("%", value, by)

    private fun isSame(value: Any?, other: Any?): Boolean =
        if (other == null || other is Boolean) value == other else unknown("the test sameas with ${typeOf(other)}")

    private companion object {
        val COMPARED = mapOf(
            "eq" to "==", "==" to "==", "equalto" to "==", "ne" to "!=", "!=" to "!=", "gt" to ">", ">" to ">", "greaterthan" to ">",
            "ge" to ">=", ">=" to ">=", "lt" to "<", "<" to "<", "lessthan" to "<", "le" to "<=", "<=" to "<=", "in" to "in",
        )
    }
}
