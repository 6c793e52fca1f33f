package dev.lobit.core

import java.io.File
import java.nio.ByteBuffer
import org.json.JSONArray
import org.json.JSONException
import org.json.JSONObject
import org.json.JSONTokener
import org.pytorch.executorch.EValue
import org.pytorch.executorch.ExecuTorchRuntime
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor
import org.pytorch.executorch.extension.llm.LlmCallback
import org.pytorch.executorch.extension.llm.LlmModule

/**
 * Bundles for targets `xnnpack` and, where the library has its backend, `qnn`; [scratch] is a folder for temporary files.
 *
 * The native libraries must be loaded (`NativeLibraries.load`).
 */
class ExecuTorch(private val scratch: File) : Runtime {
    override val backends: List<String> get() = ExecuTorchRuntime.getRegisteredBackends().toList()

    override fun engine(bundle: Bundle, threads: Int): Engine = told(bundle) {
        val manifest = bundle.manifest
        val path = bundle.file("program").path
        val count = if (threads > 0) threads else manifest.threads
        if (isCached(manifest)) cachedEngine(bundle, ModuleProgram(path, manifest.methods, count))
        else ModuleEngine(path, manifest.method("step").name, manifest.context, manifest.chunk, count)
    }

    private fun isCached(manifest: Manifest) = manifest.methods.any { it.role == "decode" }

    private fun cachedEngine(bundle: Bundle, program: Program): Engine = try {
        CachedEngine(bundle, program)
    } catch (error: LobitException) {
        program.close()
        throw error
    }

    override fun textEngine(bundle: Bundle): TextEngine = told(bundle) {
        if (isCached(bundle.manifest)) {
            val why = "ExecuTorch's runner cannot keep its caches"
            throw LobitException("this app measures and checks bundle ${bundle.manifest.name}, and does not chat with it: $why")
        }
        val tokenizer = bundle.file("tokenizer")
        val text = tokenizer.readText()
        val module = LlmModule(bundle.file("program").path, (streamable(text) ?: tokenizer).path, 0f).also { it.load() }
        LlmEngine(module, stopTexts(text, bundle.manifest.tokens.stop.toSet()))
    }

    /**
     * The file of a tokenizer as ExecuTorch's runner needs it; null where that is the bundle's own.
     *
     * The runner decodes token by token, and a decoder of type `Strip`, which removes the space before a whole text, would then remove
     * that of every word: it is left out.
     */
    private fun streamable(text: String): File? {
        if (!STRIP.containsMatchIn(text)) return null
        val json = JSONObject(text)
        val decoders = json.optJSONObject("decoder")?.optJSONArray("decoders") ?: return null
        val kept = (0 until decoders.length()).map(decoders::getJSONObject).filter { it.optString("type") != "Strip" }
        json.getJSONObject("decoder").put("decoders", JSONArray(kept))
        return File(scratch.apply { mkdirs() }, "tokenizer.json").apply { writeText(json.toString()) }
    }

    /** The texts of stop tokens: the runner gives that of the token that ends an answer, which is no part of it. */
    private fun stopTexts(text: String, stops: Set<Long>): Set<String> {
        val start = ADDED.find(text)?.range?.last ?: return emptySet()
        // The list stands before the vocabulary, which is large and need not be read for it.
        val added = JSONTokener(text.substring(start)).nextValue() as? JSONArray ?: return emptySet()
        val found = (0 until added.length()).map(added::getJSONObject).filter { it.getLong("id") in stops }
        return found.map { it.getString("content") }.toSet()
    }

    /** Native errors as a sentence. */
    private fun <T> told(bundle: Bundle, open: () -> T): T = try {
        open()
    } catch (error: RuntimeException) {
        throw LobitException("${bundle.manifest.name} cannot be loaded (${error.message}): export it with this app's lobit", error)
    }
}

private val ADDED = Regex("\"added_tokens\"\\s*:\\s*\\[")
private val STRIP = Regex("\"type\"\\s*:\\s*\"Strip\"")

/** [Engine] over a method of a program that takes tokens [1, T] and a position [1]. */
class ModuleEngine(path: String, private val method: String, context: Int, chunk: Int, threads: Int) : ChunkedEngine(context, chunk) {
    private val module = Module(path, threads).also { it.load(method) }

    override fun step(tokens: LongArray, position: Long): FloatArray {
        val arguments = arrayOf(EValue.from(Tensor.of(tokens, 1, tokens.size.toLong())), EValue.from(Tensor.of(longArrayOf(position), 1)))
        return module.execute(method, *arguments)[0].toTensor().floats()
    }

    override fun close() = module.close()
}

/** [Program] over ExecuTorch, whose methods take and give values in the order of their ports. */
private class ModuleProgram(path: String, methods: List<Method>, threads: Int) : Program {
    private val module = Module(path, threads)

    init {
        try {
            for (method in methods) module.load(method.name)
        } catch (error: RuntimeException) {
            module.close()
            throw error
        }
    }

    override fun run(method: Method, inputs: Map<String, ByteBuffer>): Map<String, ByteBuffer> {
        val arguments = method.inputs.map { port ->
            val shape = LongArray(port.shape.size) { port.shape[it] as Long }
            EValue.from(Tensor.of(inputs.getValue(port.name), port.dtype, *shape))
        }
        val results = module.execute(method.name, *arguments.toTypedArray())
        check(results.size == method.outputs.size) { "method ${method.name} has ${results.size} results, not ${method.outputs.size}" }
        return method.outputs.zip(results).associate { (port, result) -> port.name to result.toTensor().elements(port.dtype) }
    }

    override fun close() = module.close()
}

/** [TextEngine] over ExecuTorch's own text runner and tokenizer. */
private class LlmEngine(private val module: LlmModule, private val stopTexts: Set<String>) : TextEngine {
    override fun generate(prompt: String, length: Int, temperature: Float, onText: (String) -> Unit): Counts {
        var counts = Counts(0, 0, 0, 0, 0)
        var failure: String? = null
        module.generate(prompt, length, temperature, object : LlmCallback {
            override fun onResult(result: String) {
                if (result !in stopTexts) onText(result)
            }

            override fun onStats(stats: String) {
                counts = countsOf(stats)
            }

            override fun onError(errorCode: Int, message: String) {
                failure = message
            }
        })
        failure?.let { throw LobitException("generating failed: $it") }
        return counts
    }

    /** Reads ExecuTorch's statistics (`extension/llm/runner/stats.h`); what it does not tell counts as 0. */
    private fun countsOf(stats: String): Counts {
        val told = try { JSONObject(stats) } catch (_: JSONException) { JSONObject() }
        val (begin, read, first, end) =
            listOf("inference_start_ms", "prompt_eval_end_ms", "first_token_ms", "inference_end_ms").map(told::optLong)
        return Counts(told.optInt("prompt_tokens"), told.optInt("generated_tokens"), read - begin, end - read, first - begin)
    }

    override fun stop() = module.stop()

    override fun reset() = module.reset()

    override fun close() = module.close()
}
