package dev.lobit.core.template

import java.math.BigDecimal
import java.math.RoundingMode

/** Filters that give numbers. */
internal class NumberFilters(private val work: Work) {
    fun apply(name: String, value: Any?, given: Arguments): Any? = when (name) {
        "int" -> {
            val (default, base) = given.bind(name, 0, "default", "base")
            if (base.or(10L) != 10L) unknown("the filter int with a base")
            whole(value, default.or(0L))
        }
        "float" -> fraction(value) ?: given.bind(name, 0, "default")[0].or(0.0)
        "abs" -> when (val number = number(value)) {
            is Long -> if (number < 0) Math.negateExact(number) else number
            is Double -> Math.abs(number)
            else -> broken("${typeOf(value)} has no absolute value")
        }
        "round" -> round(value, given)
        "sum" -> {
            val (attribute, start) = given.bind(name, 0, "attribute", "start")
            if (attribute.or(null) != null) unknown("the filter sum with an attribute")
            work.iterated(value).asSequence().fold(start.or(0L)) { sum, item -> work.binary("+", sum, item) }
        }
        else -> unknown("the filter $name")
    }

    private fun whole(value: Any?, default: Any?): Any? {
        if (value is String) {
            val written = stripped(value, null)
            if (WHOLE.matches(written)) return written.replace("_", "").toLongOrNull() ?: unknown("a number as large as that")
        }
        val found = fraction(value)
        return when {
            value is Long || value is Boolean -> number(value)
            found == null || found.isNaN() || (found.isInfinite() && value is String) -> default
            found.isInfinite() -> broken("an infinite number as a whole one")
            Math.abs(found) < Long.MAX_VALUE.toDouble() -> found.toLong()
            else -> unknown("a number as large as that")
        }
    }

    /** The value as a float, or null where it is none. */
    private fun fraction(value: Any?): Double? = when (value) {
        is Undefined -> broken("${value.what} is undefined")
        is String -> {
            val written = lower(stripped(value, null))
            when {
                FLOAT.matches(written) -> written.replace("_", "").toDouble()
                !NAMED.matches(written) -> null
                written.endsWith("nan") -> Double.NaN
                written.startsWith("-") -> Double.NEGATIVE_INFINITY
                else -> Double.POSITIVE_INFINITY
            }
        }
        else -> number(value)?.toDouble()
    }

    private fun round(value: Any?, given: Arguments): Number {
        val (precision, method) = given.bind("round", 0, "precision", "method")
        val told = whole(precision.or(0L)) ?: broken("round needs a whole number")
        val digits = if (told in 0..MOST_DIGITS) told.toInt() else unknown("round to $told digits")
        val number = number(value) ?: broken("${typeOf(value)} is rounded")
        val factor = Math.pow(10.0, digits.toDouble())
        return when (method.or("common")) {
            "common" -> if (number is Long) number else BigDecimal(finite(number)).setScale(digits, RoundingMode.HALF_EVEN).toDouble()
            "ceil" -> Math.ceil(finite(number) * factor).let { if (digits == 0) it else it / factor }
            "floor" -> Math.floor(finite(number) * factor).let { if (digits == 0) it else it / factor }
            else -> broken("round does not know the method ${work.printed(method)}")
        }
    }

    private fun finite(number: Number): Double = number.toDouble().takeIf { it.isFinite() } ?: unknown("rounding a number that is none")

    private companion object {
        const val MOST_DIGITS = 15L
        val WHOLE = Regex("[+-]?[0-9](?:_?[0-9])*")
        val FLOAT = Regex("[+-]?(?:[0-9](?:_?[0-9])*\\.?(?:[0-9](?:_?[0-9])*)?|\\.[0-9](?:_?[0-9])*)(?:e[+-]?[0-9](?:_?[0-9])*)?")
        val NAMED = Regex("[+-]?(?:nan|inf|infinity)")
    }
}
