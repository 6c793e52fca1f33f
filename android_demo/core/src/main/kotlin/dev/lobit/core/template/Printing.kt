package dev.lobit.core.template

import java.math.BigDecimal
import java.math.MathContext

/** The text that a value is printed as: Python's `str`. */
internal fun Work.printed(value: Any?): String = when (value) {
    is String -> value
    is SafeText -> value.text
    is Undefined -> ""
    else -> represented(value)
}

/** Python's `repr`. */
internal fun Work.represented(value: Any?): String {
    step()
    return when (value) {
        null -> "None"
        is Boolean -> if (value) "True" else "False"
        is Long -> value.toString()
        is Double -> Doubles.text(value)
        is String -> quoted(value)
        is List<*> -> joined(value, "[", "]") { represented(it) }
        is TupleValue -> joined(value.items, "(", if (value.items.size == 1) ",)" else ")") { represented(it) }
        is Map<*, *> -> joined(value.entries, "{", "}") { "${represented(it.key)}: ${represented(it.value)}" }
        is View -> "dict_${value.kind}(${represented(value.items)})"
        is RangeValue -> "range(${value.start}, ${value.stop}${if (value.step == 1L) "" else ", ${value.step}"})"
        is Undefined -> "Undefined"
        else -> unknown("printing ${typeOf(value)}")
    }
}

private fun <T> Work.joined(items: Collection<T>, open: String, close: String, write: (T) -> String): String {
    val found = StringBuilder(open)
    for (item in items) {
        if (found.length > open.length) found.append(", ")
        val part = write(item)
        text(part.length.toLong())
        found.append(part)
    }
    return found.append(close).toString()
}

/** Floating-point numbers as Python writes them. */
internal object Doubles {
    fun text(value: Double): String {
        if (value.isNaN()) return "nan"
        if (value.isInfinite()) return if (value > 0) "inf" else "-inf"
        val sign = if (value < 0 || 1 / value < 0) "-" else ""
        if (value == 0.0) return "${sign}0.0"
        val whole = BigDecimal(Math.abs(value))
        val shortest = (1..17).map { whole.round(MathContext(it)) }.first { it.toDouble() == Math.abs(value) }
        val digits = shortest.unscaledValue().toString().trimEnd('0')
        val exponent = shortest.precision() - shortest.scale() - 1
        return sign + if (exponent in -4..15) positional(digits, exponent) else scientific(digits, exponent)
    }

    private fun positional(digits: String, exponent: Int) = when {
        exponent < 0 -> "0." + "0".repeat(-exponent - 1) + digits
        digits.length > exponent + 1 -> digits.take(exponent + 1) + "." + digits.drop(exponent + 1)
        else -> digits.padEnd(exponent + 1, '0') + ".0"
    }

    private fun scientific(digits: String, exponent: Int): String {
        val fraction = if (digits.length > 1) "." + digits.drop(1) else ""
        val power = Math.abs(exponent).toString().padStart(2, '0')
        return "${digits[0]}${fraction}e${if (exponent < 0) "-" else "+"}$power"
    }
}
