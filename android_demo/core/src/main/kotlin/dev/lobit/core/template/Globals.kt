package dev.lobit.core.template

import java.time.LocalDateTime

/** Functions that every template has. */
internal class Globals(private val work: Work, private val now: () -> LocalDateTime) {
    val values: Map<String, Any?> = mapOf(
        "range" to Callable("range") { range(it) },
        "dict" to Callable("dict") { dict(it) },
        "namespace" to Callable("namespace") { namespace(it) },
        "raise_exception" to Callable("raise_exception") { throw Refused(work.printed(it.bind("raise_exception", 1, "message")[0])) },
        "strftime_now" to Callable("strftime_now") { date(it.bind("strftime_now", 1, "form")[0]) },
    )

    private fun range(given: Arguments): RangeValue {
        val numbers = given.positional.map { whole(it) ?: broken("range needs whole numbers, not ${typeOf(it)}") }
        if (numbers.size !in 1..3 || given.named.isNotEmpty()) broken("range takes one to three numbers")
        val step = numbers.getOrElse(2) { 1 }
        if (step == 0L) broken("a range with the step 0")
        val found = if (numbers.size == 1) RangeValue(0, numbers[0], 1) else RangeValue(numbers[0], numbers[1], step)
        work.items(found.items.size.toLong())
        return found
    }

    private fun dict(given: Arguments): Map<Any?, Any?> {
        val found = LinkedHashMap<Any?, Any?>()
        if (given.positional.size > 1) broken("dict takes one value")
        when (val from = given.positional.firstOrNull() ?: emptyList<Any?>()) {
            is Map<*, *> -> found.putAll(from)
            else -> for (pair in work.iterated(from)) {
                val parts = work.listed(pair)
                if (parts.size != 2) broken("dict needs pairs")
                found[key(parts[0])] = parts[1]
            }
        }
        return found.apply { putAll(given.named) }
    }

    private fun namespace(given: Arguments): Namespace {
        val values = LinkedHashMap<String, Any?>()
        for ((name, value) in dict(given)) values[name as? String ?: unknown("a namespace whose names are not text")] = value
        values.keys.find { it.startsWith("_") }?.let { broken("a namespace cannot hold $it") }
        return Namespace(values)
    }

    private fun date(form: Any?): String {
        val text = form as? String ?: broken("strftime_now needs text")
        val time = now()
        val found = StringBuilder()
        var at = 0
        while (at < text.length) {
            val letter = text[at++]
            if (letter != '%' || at == text.length) found.append(letter) else found.append(part(text[at++], time))
        }
        return found.toString()
    }

    /** A part of a date in English, as the C locale has it. */
    private fun part(letter: Char, time: LocalDateTime): String = when (letter) {
        'Y' -> "${time.year}"
        'y' -> two(time.year % 100)
        'm' -> two(time.monthValue)
        'd' -> two(time.dayOfMonth)
        'e' -> "${time.dayOfMonth}".padStart(2)
        'H' -> two(time.hour)
        'I' -> two((time.hour + 11) % 12 + 1)
        'M' -> two(time.minute)
        'S' -> two(time.second)
        'p' -> if (time.hour < 12) "AM" else "PM"
        'j' -> "${time.dayOfYear}".padStart(3, '0')
        'B' -> capitalized(time.month.name)
        'b' -> capitalized(time.month.name).take(3)
        'A' -> capitalized(time.dayOfWeek.name)
        'a' -> capitalized(time.dayOfWeek.name).take(3)
        'F' -> "${time.year}-${two(time.monthValue)}-${two(time.dayOfMonth)}"
        'T' -> "${two(time.hour)}:${two(time.minute)}:${two(time.second)}"
        '%' -> "%"
        else -> unknown("the part %$letter of a date")
    }

    private fun two(number: Int) = "$number".padStart(2, '0')
}
