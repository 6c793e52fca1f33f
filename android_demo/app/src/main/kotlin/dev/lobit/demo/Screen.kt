package dev.lobit.demo

import android.app.Activity
import android.view.View
import android.widget.Button
import android.widget.ProgressBar
import android.widget.TextView

/** A screen that shows the [Store]'s state while it is visible. */
abstract class Screen : Activity() {
    protected val app: DemoApplication get() = application as DemoApplication
    protected val store: Store get() = app.store
    private val observer: (State) -> Unit = { show(it) }

    /** Called with every new state, on the main thread. */
    protected abstract fun show(state: State)

    override fun onStart() {
        super.onStart()
        store.observe(observer)
    }

    override fun onStop() {
        store.forget(observer)
        super.onStop()
    }

    override fun onNavigateUp(): Boolean {
        finish()
        return true
    }

    /** Shows what went wrong, if anything did, and what is going on, in the views that every screen has. */
    protected fun showWork(state: State) {
        findViewById<TextView>(R.id.problem).setTextOrHide(state.problem)
        findViewById<TextView?>(R.id.work)?.setTextOrHide(state.work?.what)
        findViewById<ProgressBar?>(R.id.progress)?.let { bar ->
            bar.visibility = if (state.work == null) View.GONE else View.VISIBLE
            bar.isIndeterminate = state.work?.share == null
            state.work?.share?.let { bar.progress = (it * bar.max).toInt() }
        }
        findViewById<Button?>(R.id.cancel)?.let { button ->
            button.visibility = if (state.work == null) View.GONE else View.VISIBLE
            state.work?.let { button.contentDescription = getString(R.string.cancel_work, it.what) }
            button.setOnClickListener { cancelWork() }
        }
    }

    /** What the button beside the work does. */
    protected open fun cancelWork() = store.cancelWork()
}

/** Shows a text, or hides the view where there is none. The same text is not set again: a screen reader would repeat it. */
fun TextView.setTextOrHide(text: String?) {
    visibility = if (text == null) View.GONE else View.VISIBLE
    if (text != null && text != this.text.toString()) this.text = text
}
