package dev.lobit.demo

import android.content.ContentResolver
import android.net.Uri
import dev.lobit.core.Bench
import dev.lobit.core.BenchRequest
import dev.lobit.core.Conversation
import dev.lobit.core.LobitException
import dev.lobit.core.Message
import dev.lobit.core.Probe
import dev.lobit.core.Runtime
import dev.lobit.core.TextEngine
import java.util.concurrent.Executor

/**
 * The app's state in one place, which outlives screens: a rotation in the middle of an answer changes nothing.
 *
 * Actions are called on the main thread and return at once; models are loaded and run on [background], one thing at a time. [main] runs
 * code on the main thread.
 */
class Store(
    private val runtime: () -> Runtime,
    private val library: Library,
    private val probe: Probe,
    private val texts: Texts,
    private val background: Executor,
    private val main: (() -> Unit) -> Unit,
) {
    /** Sentences of the app's resources. */
    interface Texts {
        fun copying(): String

        fun checking(name: String): String

        fun loading(name: String): String

        fun measuring(row: String, done: Int, all: Int): String
    }

    var state = State()
        private set
    private val observers = mutableListOf<(State) -> Unit>()

    /** What is loaded; touched on the background thread alone, but for [Conversation.stop]. */
    @Volatile private var conversation: Conversation? = null
    private var engine: TextEngine? = null

    /** What loads, or has loaded, the bundle that is [State.open]; on the main thread alone. */
    private var opening: Job? = null

    /** What writes the last answer, and what runs [State.bench]; on the main thread alone. */
    private var answering: Job? = null
    private var benching: Job? = null

    fun observe(observer: (State) -> Unit) {
        observers += observer
        observer(state)
    }

    fun forget(observer: (State) -> Unit) {
        observers -= observer
    }

    private fun update(change: (State) -> State) {
        state = change(state)
        observers.toList().forEach { it(state) }
    }

    /**
     * Runs [work] in the background; what it throws becomes the sentence that the screens show, unless [job] was cancelled.
     *
     * [after] runs on the main thread at the end in any case.
     */
    private fun run(job: Job = Job(), after: () -> Unit = {}, work: () -> Unit) = background.execute {
        val problem = try {
            job.check()
            work()
            null
        } catch (error: LobitException) {
            error.message
        } catch (error: OutOfMemoryError) {
            "there is not enough memory: close other apps, or take a smaller model (${error.message})"
        } catch (error: Exception) {
            "this failed: $error"
        }
        main {
            hide(job)
            if (problem != null && !job.isCancelled) update { it.copy(problem = problem) }
            after()
        }
    }

    private fun show(work: Work) = main { if (!work.job.isCancelled) update { it.copy(work = work) } }

    private fun hide(job: Job) = update { state -> state.copy(work = state.work?.takeIf { it.job !== job }) }

    /** Shows how far a job is, and ends it where it was cancelled. */
    private fun progress(job: Job, what: String): (Long, Long) -> Unit {
        var shown = -1
        return { done, total ->
            job.check()
            val thousandths = if (total > 0) (done * 1000 / total).toInt() else -1
            if (thousandths != shown) {
                shown = thousandths
                show(Work(what, if (total > 0) thousandths / 1000f else null, job))
            }
        }
    }

    /**
     * Cancels what the screens show as [State.work]: they show at once that it is over.
     *
     * Copies and comparisons of hashes end with their next bytes, and a copy leaves nothing. A model that the runtime loads is closed as
     * soon as it is there; what comes next waits for that in the background.
     */
    fun cancelWork() {
        val job = state.work?.job ?: return
        when (job) {
            opening -> close()
            benching -> cancelBench()
            else -> {
                job.cancel()
                hide(job)
            }
        }
    }

    fun dismissProblem() = update { it.copy(problem = null) }

    /** Reads the list of bundles again; the first time, those inside the APK are unpacked. */
    fun refresh() = run {
        library.unpackAssets()
        val entries = library.entries()
        main { update { it.copy(entries = entries) } }
    }

    fun takeZip(resolver: ContentResolver, uri: Uri) = take { library.takeZip(resolver, uri, it) }

    fun takeFolder(resolver: ContentResolver, tree: Uri) = take { library.takeFolder(resolver, tree, it) }

    private fun take(copy: ((Long, Long) -> Unit) -> Unit) {
        val job = Job()
        update { it.copy(work = Work(texts.copying(), job = job)) }
        run(job, after = ::refresh) { copy(progress(job, texts.copying())) }
    }

    fun remove(name: String) {
        if (state.open == name) close()
        run(after = ::refresh) { library.remove(name) }
    }

    /** Loads a bundle for a conversation, in the place of the one that is loaded. */
    fun open(name: String) {
        if (state.open == name) return
        leave()
        val job = Job().also { opening = it }
        val work = Work(texts.loading(name), job = job)
        update { State(entries = it.entries, open = name, work = work, settings = it.settings, bench = it.bench) }
        run(job, after = { if (opening === job && !job.isFinished) close() }) {
            release()
            val bundle = library.checked(name, progress(job, texts.checking(name)))
            show(Work(texts.loading(name), job = job))
            val opened = runtime().textEngine(bundle).also { engine = it }
            val begun = Conversation(opened, bundle.manifest).also { it.reset(state.settings.system) }
            if (!job.finish()) return@run release()
            conversation = begun
            main { ifOpen(job) { it.copy(chats = begun.chats) } }
        }
    }

    /** Ends the conversation and frees the model's memory; a bundle that is being loaded is not loaded. */
    fun close() {
        leave()
        run { release() }
    }

    /** Gives up loading a bundle; one that is loaded stays. */
    fun cancelOpening(name: String) {
        if (state.open == name && opening?.isFinished == false) close()
    }

    /** Shows no conversation; what was its, or would have been, is of no effect from now on. */
    private fun leave() {
        stop()
        opening?.let {
            it.cancel()
            hide(it)
        }
        opening = null
        update { it.copy(open = null, messages = emptyList(), answering = false, counts = null) }
    }

    /** Changes the state where [talk] still is what has opened the conversation. */
    private fun ifOpen(talk: Job?, change: (State) -> State) {
        if (opening === talk) update(change)
    }

    private fun release() {
        synchronized(this) { conversation = null }
        engine?.close()
        engine = null
    }

    /** Lets the model answer; the pieces of the answer appear as the last message. */
    fun say(text: String) {
        val settings = state.settings
        val talk = opening
        val job = Job().also { answering = it }
        val turn = listOf(Message(Conversation.USER, text), Message(Conversation.ASSISTANT, ""))
        update { it.copy(messages = it.messages + turn, answering = true, counts = null, problem = null) }
        run(job, after = { ifOpen(talk) { withMessages(it).copy(answering = false) } }) {
            val current = conversation ?: throw LobitException("no model is loaded: open one first")
            val counts = current.reply(text, settings.length, settings.temperature) { piece ->
                main { ifOpen(talk) { append(it, piece) } }
            }
            main { ifOpen(talk) { it.copy(counts = counts) } }
        }
    }

    private fun append(state: State, piece: String): State {
        val last = state.messages.lastOrNull()
        return if (last == null || last.role != Conversation.ASSISTANT) state
        else state.copy(messages = state.messages.dropLast(1) + last.copy(text = last.text + piece))
    }

    /** After a turn the messages are the conversation's own: a turn that failed is not among them. */
    private fun withMessages(state: State): State {
        val messages = conversation?.messages.orEmpty().filter { it.role != Conversation.SYSTEM }
        return state.copy(messages = messages)
    }

    /** Ends an answer after its current token; one that has not begun does not begin. */
    fun stop() {
        answering?.cancel()
        synchronized(this) { conversation?.stop() } // not while it is closed
    }

    /** Begins a new conversation. */
    fun reset() {
        stop()
        update { it.copy(messages = emptyList(), counts = null, problem = null) }
        val talk = opening
        run(after = { ifOpen(talk, ::withMessages) }) { conversation?.reset(state.settings.system) }
    }

    /** Takes new settings; another system message begins a new conversation. */
    fun change(settings: Settings) {
        val anew = settings.system != state.settings.system
        update { it.copy(settings = settings) }
        if (anew && conversation != null) reset()
    }

    /** Times a bundle. Its model is loaded for this alone: a conversation ends. */
    fun bench(name: String, request: BenchRequest) {
        leave()
        cancelBench()
        val job = Job().also { benching = it }
        update { it.copy(problem = null, bench = BenchState(name, request, running = true)) }
        run(job, after = { if (benching === job) endBench() }) {
            release()
            val bundle = library.checked(name, progress(job, texts.checking(name)))
            val bench = Bench(probe, check = job::check) { threads -> runtime().engine(bundle, threads) }
            val result = bench.run(request) { row, done, all ->
                show(Work(texts.measuring(row, done + 1, all), done.toFloat() / all, job))
            }
            main { if (!job.isCancelled) update { it.copy(bench = it.bench?.copy(result = result)) } }
        }
    }

    /** Ends a benchmark before its next row or sample. */
    fun cancelBench() {
        val job = benching ?: return
        job.cancel()
        hide(job)
        endBench()
    }

    private fun endBench() {
        benching = null
        update { it.copy(bench = it.bench?.copy(running = false)) }
    }
}
