package dev.lobit.demo

import java.io.File
import org.junit.Before
import org.junit.runner.RunWith
import org.robolectric.RobolectricTestRunner
import org.robolectric.RuntimeEnvironment
import org.robolectric.annotation.Config

/** The app with a fake runtime and one bundle, `demo`, which it has listed. */
@RunWith(RobolectricTestRunner::class)
@Config(sdk = [34], application = FakeApplication::class)
abstract class AppTest {
    protected val app get() = RuntimeEnvironment.getApplication() as FakeApplication
    protected val store get() = app.store
    protected val root get() = File(app.filesDir, "bundles")

    @Before
    fun readBundles() {
        store.refresh()
        await("the bundle is listed") { store.state.entries.isNotEmpty() }
    }

    /** Names of the bundles' folders, finished or not. */
    protected fun names() = root.list().orEmpty().sorted()

    protected fun awaitCopy() = await("it is copied or refused") {
        store.state.work == null && (store.state.problem != null || store.state.entries.size > 1)
    }
}
