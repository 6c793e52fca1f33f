package dev.lobit.core.template

/** Why a template ends early; [ChatTemplate] makes sentences of these. */
internal sealed class TemplateProblem(message: String) : Exception(message)

/** The template is broken, or does what Jinja refuses too. */
internal class Broken(message: String) : TemplateProblem(message)

/** The template uses something of Jinja or Python that is not known here. */
internal class Unknown(val what: String) : TemplateProblem(what)

/** The template called `raise_exception`: it was not made for these messages. */
internal class Refused(message: String) : TemplateProblem(message)

internal fun broken(message: String): Nothing = throw Broken(message)

internal fun unknown(what: String): Nothing = throw Unknown(what)
